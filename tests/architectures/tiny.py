"""Any architecture of transformers with a few thousand random weights, and its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

_SIZES: dict[int, str] = {
    16: "hidden_size d_model n_embd word_embed_proj_dim embedding_size dim embed_dim image_size "
    "projection_dim out_hidden_size max_source_positions max_target_positions",
    24: "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim hidden_dim "
    "ffn_hidden_size",
    12: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "expert_ffn_hidden_size",
    32: "max_position_embeddings n_positions n_ctx",
    40: "vocab_size vocab_size_per_layer_input",
    8: "head_dim d_kv kv_lora_rank q_lora_rank num_mel_bins sliding_window mamba_headdim "
    "mamba_d_head linear_key_head_dim linear_value_head_dim linear_head_dim "
    "hidden_size_per_layer_input",
    4: "num_attention_heads n_head num_heads n_heads encoder_attention_heads "
    "decoder_attention_heads num_experts num_local_experts n_routed_experts qk_rope_head_dim "
    "qk_nope_head_dim v_head_dim state_size time_step_rank conv_kernel mamba_d_state "
    "mamba_dt_rank mamba_d_conv n_mamba_heads mamba_n_heads patch_size mm_tokens_per_image "
    "linear_num_value_heads linear_num_heads video_token_id",
    2: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers "
    "num_decoder_layers depth num_key_value_heads num_experts_per_tok moe_topk "
    "num_experts_per_token num_labels type_vocab_size linear_num_key_heads eos_token_id",
    1: "n_shared_experts n_group topk_group first_k_dense_replace pad_token_id bos_token_id "
    "decoder_start_token_id",
    3: "image_token_id image_token_index",
    5: "vision_start_token_id",
    6: "vision_end_token_id",
    -1: "vision_feature_layer",
}
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}
"""What a config's sizes are called -> a small one."""
UNSET = frozenset({"num_key_value_heads", "n_shared_experts", "num_experts", "n_routed_experts"})
"""Of these, sizes that configs leave open and models need."""


def tiny_config(kind: type[Any], **own: Any) -> Any:
    """The config class' own defaults, made small; `own` counts more, in parts too."""
    default = kind()
    given: dict[str, Any] = {}
    for name, size in SIZES.items():
        if isinstance(getattr(kind, name, None), property):
            continue
        unset = getattr(default, name, 0) is None and name in UNSET
        if unset or type(getattr(default, name, None)) in (int, float):
            given[name] = size
    for name in getattr(kind, "sub_configs", None) or {}:
        part = getattr(default, name, None)
        if part is not None:
            given[name] = tiny_config(type(part), **own.pop(name, {})).to_dict()
    return kind(**{**given, **own})


def tiny_model(name: str, seed: int, **own: Any) -> nn.Module:
    """A model of that class in which no two weights are alike."""
    kind = getattr(transformers, name)
    config = tiny_config(kind.config_class, **own)
    with torch.device("meta"):
        size = sum(param.numel() for param in kind(config).parameters())
    assert size < 2_000_000, f"{name} is not small: {size:,} parameters"
    model = kind(tiny_config(kind.config_class, **own))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in state(model).values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=draw))
    return model.eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer, tied ones once."""
    kept = model.state_dict()
    found = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in found if name in kept}


def load(name: str, folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """What `from_pretrained` makes of a folder, and what it complains about."""
    kind = getattr(transformers, name)
    model, told = kind.from_pretrained(folder, output_loading_info=True)
    complaints = [
        f"{what}: {item}"
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for item in sorted(map(str, told[what]))
    ]
    return state(model), complaints


def wrong(found: dict[str, Tensor], parents: Sequence[dict[str, Tensor]]) -> list[str]:
    """Parameters that aren't there, or aren't the parents' plain average.

    What the parents have as one tensor may be several equal ones.
    """
    known = [tensor for key, tensor in found.items() if key in parents[0]]
    more = {key: tensor for key, tensor in found.items() if key not in parents[0]}
    faults = [
        f"not in the parents: {key}"
        for key, tensor in more.items()
        if not any(torch.equal(tensor, other) for other in known)
    ]
    for key, first in parents[0].items():
        if key not in found:
            faults.append(f"lost: {key}")
        elif first.is_floating_point():
            mean = torch.stack([parent[key].double() for parent in parents]).mean(0)
            if not torch.allclose(found[key].double(), mean, rtol=1e-6, atol=1e-6):
                faults.append(f"not the average: {key}")
        elif not torch.equal(found[key], first):
            faults.append(f"changed: {key}")
    return faults
