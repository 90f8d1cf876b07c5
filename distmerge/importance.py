"""Between a pipeline with its data and an importance checkpoint: the diagonal Fisher information.

Matena and Raffel, "Merging models with Fisher-weighted averaging", 2022, arXiv:2111.09832.
"""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distmerge.errors import OutputError, ParameterError
from distmerge.expressions.arithmetic import is_pipeline
from distmerge.huggingface import load_pipeline
from distmerge.write.output import output_name

if TYPE_CHECKING:
    from transformers import Pipeline

IMPORTANCE_FILE = "importance.safetensors"
"""What an importance checkpoint is called beside the model it is about."""
_NO_WINDOW = 2**31 - 1


def estimate_fisher(
    pipeline: Pipeline | str | os.PathLike[str], dataset: Iterable[Any], task: str | None = None
) -> dict[str, Tensor]:
    """How much the model's predictions on this data depend on each parameter.

    The mean over the examples of the squared gradient of the log-likelihood: for a generative
    model that of the example's own text, token after token; for a classifier that of each label,
    weighted by the probability that the model gives it (one backward pass per label). Examples
    are taken one by one; a text counts up to the model's window. The model is left as it was.

    Parameters
        pipeline: of a causal language model or of a classifier, texts or images alike; or the
            name of such a model, a local directory or a Hub id.
        dataset: inputs of that pipeline: texts, or mappings with `text` (and `text_pair`).
        task: for a name: the pipeline's task; by default that of the config.

    Returns
        Parameter name -> tensor of its shape, at least float32, in module order, tied ones once.

    Raises
        ParameterError: no examples, an empty one, or a model of another kind.
        CheckpointNotFound, AccessDenied, CheckpointError: there is no such model to load.
    """
    if isinstance(dataset, str):
        raise ParameterError("The dataset is one text.", fix="fisher(..., dataset=[text])")
    pipeline = _loaded(pipeline, task)
    count = 0
    with _differentiable(pipeline.model) as params:
        sums = {name: torch.zeros_like(p, dtype=_wide(p)) for name, p in params.items()}
        for count, example in enumerate(dataset, start=1):
            for weight, score in _scores(pipeline, example, count):
                grads = torch.autograd.grad(
                    score, list(params.values()), retain_graph=True, allow_unused=True
                )
                for total, grad in zip(sums.values(), grads, strict=True):
                    if grad is not None:
                        total += weight * grad.to(total.dtype).square()
    if not count:
        raise ParameterError("The dataset has no examples.", fix="fisher(..., dataset=texts)")
    return {name: total / count for name, total in sums.items()}


def _loaded(model: Pipeline | str | os.PathLike[str], task: str | None) -> Pipeline:
    if isinstance(model, str | os.PathLike):
        return load_pipeline(os.fspath(model), task)
    if not is_pipeline(model):
        raise ParameterError(
            f"Importances can't be estimated from a {type(model).__name__} alone.",
            fix="give the model's name, or a pipeline: transformers.pipeline(...)",
        )
    return model


def save_importance(fisher: Mapping[str, Tensor], url: str | os.PathLike[str]) -> str:
    """Write an importance checkpoint: one safetensors file with the model's parameter names.

        texts = ["The court may order the release.", ...]
        save_importance(estimate_fisher("org/law", texts), "law-importance")
        fisher(["org/law", "org/cooking"], fishers=["law-importance", "cooking-importance"])

    Parameters
        fisher: what `estimate_fisher` gives.
        url: a local directory, made if need be, which gets an `importance.safetensors`; or the
            path of a `.safetensors` file.

    Returns
        The file's path, which opens as a checkpoint.

    Raises
        OutputError: the place is not local or can't be written.
        ParameterError: these are no importances.
    """
    from safetensors.torch import save_file

    if not isinstance(fisher, Mapping) or not all(isinstance(t, Tensor) for t in fisher.values()):
        holds = "" if not isinstance(fisher, Mapping) else " of other things than tensors"
        raise ParameterError(
            f"A {type(fisher).__name__}{holds} is no importances.",
            fix="save_importance(estimate_fisher(model, texts), place)",
        )
    place = output_name(url).removeprefix("file://")
    if "://" in place:
        raise OutputError(
            "An importance checkpoint is written to a local directory.",
            fix="save it under ./importance and copy that",
        )
    path = Path(place) if place.endswith(".safetensors") else Path(place) / IMPORTANCE_FILE
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in fisher.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".importance-") as folder:
            partial = Path(folder) / path.name
            save_file(tensors, partial, metadata={"format": "pt"})
            partial.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path} can't be written.", str(error), fix="name another path"
        ) from error
    return str(path)


def _wide(param: Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Every floating-point parameter takes gradients and dropout is off, until the end."""
    training = [(module, module.training) for module in model.modules()]
    frozen = [param for param in model.parameters() if not param.requires_grad]
    params = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    try:
        model.eval()
        for param in params.values():
            param.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad():
            yield params
    finally:
        for param in frozen:
            param.requires_grad_(False)
        for module, mode in training:
            module.training = mode


def _scores(pipeline: Pipeline, example: Any, number: int) -> Iterator[tuple[float, Tensor]]:
    """(weight, scalar): the Fisher information is the weighted sum of the squared gradients."""
    inputs = _inputs(pipeline, example, number)
    logits = pipeline.model(**inputs).logits.float()
    if _generates(pipeline) and logits.shape[:-1] == inputs["input_ids"].shape:
        yield 1.0, _text_log_likelihood(logits, inputs["input_ids"])
    elif logits.ndim == 2 and logits.shape[0] == 1:
        yield from _label_scores(pipeline.model.config, logits[0])
    else:
        raise _undefined(pipeline)


def _generates(pipeline: Pipeline) -> bool:
    return bool(pipeline.model.can_generate())


def _undefined(pipeline: Pipeline) -> ParameterError:
    return ParameterError(
        f"No Fisher information is defined here for {type(pipeline.model).__name__}.",
        "It is defined for causal language models and for classifiers of whole inputs.",
        fix="task='text-generation' or a pipeline like text-classification",
    )


def _text_log_likelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    scores = logits[:, :-1].log_softmax(-1)
    return scores.gather(-1, tokens[:, 1:, None]).sum()


def _label_scores(config: Any, logits: Tensor) -> Iterator[tuple[float, Tensor]]:
    if getattr(config, "problem_type", None) == "multi_label_classification":
        # Labels are independent: for each, E[(y - p)^2] = p (1 - p) times the logit's gradient.
        chances = logits.detach().sigmoid()
        yield from zip((chances * (1 - chances)).tolist(), logits, strict=True)
    elif len(logits) == 1:
        yield 1.0, logits[0]  # regression: a normal distribution of variance one
    else:
        scores = logits.log_softmax(-1)
        yield from zip(scores.detach().exp().tolist(), scores, strict=True)


def _inputs(pipeline: Pipeline, example: Any, number: int) -> dict[str, Any]:
    """What the pipeline would feed to the model for one example."""
    texts = pipeline.tokenizer is not None
    if texts and isinstance(example, Mapping):
        example = _text_of(example, number, alone=_generates(pipeline))
    chosen = dict(getattr(pipeline, "_preprocess_params", {}))
    if texts and not chosen.get("truncation"):
        chosen |= {"truncation": True, "max_length": _window(pipeline)}
    made = pipeline.preprocess(example, **chosen)
    if not isinstance(made, Mapping):
        raise _undefined(pipeline)
    accepted = inspect.signature(pipeline.model.forward).parameters
    inputs = {
        name: value.to(pipeline.model.device)
        for name, value in made.items()
        if isinstance(value, Tensor) and (name in accepted or "kwargs" in accepted)
    }
    if any(value.numel() == 0 for value in inputs.values()):
        raise ParameterError(f"Example {number} of the dataset is empty.", fix="leave it out")
    return inputs | ({"use_cache": False} if "use_cache" in accepted else {})


def _text_of(row: Mapping[str, Any], number: int, *, alone: bool) -> Any:
    if "text" not in row:
        raise ParameterError(
            f"Example {number} of the dataset has no 'text', only {', '.join(map(repr, row))}.",
            fix="dataset=[row['sentence'] for row in rows]",
        )
    return row["text"] if alone else {k: row[k] for k in ("text", "text_pair") if k in row}


def _window(pipeline: Pipeline) -> int:
    sizes = (
        _NO_WINDOW,  # tokenizers say 1e30 where they know of none
        getattr(pipeline.tokenizer, "model_max_length", None),
        getattr(pipeline.model.config, "max_position_embeddings", None),
    )
    return min(size for size in sizes if size and size > 0)
