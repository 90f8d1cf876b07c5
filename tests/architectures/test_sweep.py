"""No architecture is known to distmerge, so any is merged whole: every parameter of the model that
loads is the plain average of its parents'."""

from __future__ import annotations

import pytest
from architectures.tiny import load, tiny_model, wrong

import distmerge
from distmerge.run.merge import plan

QUICK = """
    LlamaForCausalLM GPT2LMHeadModel BertForMaskedLM T5ForConditionalGeneration
    DeepseekV3ForCausalLM LlavaForConditionalGeneration MixtralForCausalLM
"""
MERGEKIT = """
    MistralForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM
    Phi3ForCausalLM Qwen2MoeForCausalLM Qwen3MoeForCausalLM GptOssForCausalLM OlmoeForCausalLM
    GraniteMoeForCausalLM Glm4MoeForCausalLM MambaForCausalLM RobertaForSequenceClassification
    ModernBertForMaskedLM BartForConditionalGeneration Qwen2_5_VLForConditionalGeneration
    Mistral3ForConditionalGeneration DeepseekV2ForCausalLM JambaForCausalLM
    ViTForImageClassification GPTNeoXForCausalLM FalconForCausalLM BertModel
    WhisperForConditionalGeneration CLIPModel Qwen2VLForConditionalGeneration
    Gemma3ForConditionalGeneration
"""
"""With the quick ones, and two of those in a further form, the 36 on which mergekit was tried."""
MORE = """
    AlbertForMaskedLM ApertusForCausalLM ArceeForCausalLM BambaForCausalLM
    BertForPreTraining BioGptForCausalLM BitNetForCausalLM Blip2ForConditionalGeneration
    BloomForCausalLM CodeGenForCausalLM Cohere2ForCausalLM CohereForCausalLM CTRLLMHeadModel
    DebertaV2ForMaskedLM DeepseekV32ForCausalLM Dinov2ForImageClassification
    DistilBertForMaskedLM ElectraForPreTraining Ernie4_5_MoeForCausalLM
    EuroBertForMaskedLM Exaone4ForCausalLM FalconMambaForCausalLM FNetForMaskedLM
    GemmaForCausalLM Glm4ForCausalLM Glm4MoeLiteForCausalLM Glm4vForConditionalGeneration
    GPTBigCodeForCausalLM GPTJForCausalLM GraniteForCausalLM GraniteMoeHybridForCausalLM
    Idefics3ForConditionalGeneration InternVLForConditionalGeneration
    JinaEmbeddingsV3Model LEDForConditionalGeneration Lfm2ForCausalLM
    Llama4ForCausalLM LlavaNextForConditionalGeneration LongcatFlashForCausalLM
    LongformerForMaskedLM M2M100ForConditionalGeneration Mamba2ForCausalLM MarianMTModel
    MBartForConditionalGeneration MiniMaxForCausalLM MiniMaxM2ForCausalLM Ministral3ForCausalLM
    Mistral4ForCausalLM MPNetForMaskedLM MptForCausalLM MT5ForConditionalGeneration
    NemotronHForCausalLM NomicBertModel Olmo2ForCausalLM Olmo3ForCausalLM
    OPTForCausalLM PaliGemmaForConditionalGeneration PegasusForConditionalGeneration
    PersimmonForCausalLM PhiForCausalLM PhimoeForCausalLM Qwen3_5ForConditionalGeneration
    Qwen3_5MoeForCausalLM Qwen3NextForCausalLM Qwen3VLForConditionalGeneration
    Qwen3VLMoeForConditionalGeneration RecurrentGemmaForCausalLM
    RobertaForMaskedLM RwkvForCausalLM SeedOssForCausalLM SiglipModel SmolLM3ForCausalLM
    SmolVLMForConditionalGeneration StableLmForCausalLM Starcoder2ForCausalLM
    SwinForImageClassification UMT5ForConditionalGeneration XGLMForCausalLM
    XLMRobertaForMaskedLM
"""
FORMS = [
    ("T5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": 0}),
    ("FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    ("Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    ("GPT2LMHeadModel", {"tie_word_embeddings": False}),
    ("ResNetForImageClassification", {"hidden_sizes": [8, 12], "depths": [1, 2]}),
    ("Wav2Vec2ForCTC", {"conv_dim": [8] * 7, "num_conv_pos_embeddings": 4}),
    ("HubertForCTC", {"conv_dim": [8] * 7, "num_conv_pos_embeddings": 4}),
    ("Dots1ForCausalLM", {}),
    ("KimiLinearForCausalLM", {}),
    ("NemotronForCausalLM", {}),
    ("GPTNeoForCausalLM", {"attention_types": [[["global", "local"], 1]]}),
    (
        "FalconH1ForCausalLM",
        {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32, "mamba_d_state": 4},
    ),
    (
        "Lfm2MoeForCausalLM",
        {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    ),
]
CASES = [
    *(pytest.param(name, {}, id=name) for name in QUICK.split()),
    *(
        pytest.param(name, own, id="-".join([name, *own]), marks=pytest.mark.full)
        for name, own in [*((n, {}) for n in (MERGEKIT + MORE).split()), *FORMS]
    ),
]


@pytest.mark.parametrize(("name", "own"), CASES)
def test_every_parameter_is_the_average(name, own, tmp_path):
    folders = [tmp_path / "one", tmp_path / "other"]
    for seed, folder in enumerate(folders):
        tiny_model(name, seed, **own).save_pretrained(folder)
    recipe = {
        "merge_method": "linear",
        "models": [str(folder) for folder in folders],
        "parameters": {"weight": 0.5},
    }
    assert plan(recipe).inputs.skipped == []
    distmerge.merge(recipe, str(tmp_path / "merged"))
    found, complaints = load(name, tmp_path / "merged")
    assert not complaints
    assert not wrong(found, [load(name, folder)[0] for folder in folders])
