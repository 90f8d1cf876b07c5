"""From tensors in memory and a folder with all of a model's files but its weights, to the model or
its pipeline: what `from_pretrained` would make if the weights lay there too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from distmerge.errors import CheckpointError, KeyMismatch
from distmerge.huggingface.pipelines import pipeline_around
from distmerge.huggingface.state_dict import read_state_dict
from distmerge.huggingface.tasks import infer_task

_PARTS = {
    "tokenizer": ("tokenizer_config.json", "tokenizer.json", "vocab.txt", "vocab.json"),
    "image_processor": ("preprocessor_config.json", "processor_config.json"),
    "feature_extractor": ("preprocessor_config.json", "processor_config.json"),
    "processor": ("processor_config.json",),
}
"""Arguments of `transformers.pipeline`, and the files that show that a model has such a part."""


def model_from(folder: Path, tensors: Mapping[str, Tensor]) -> Any:
    """The model in eval mode; it may share the tensors.

    Raises
        CheckpointError: the config makes no model of transformers' own.
        KeyMismatch: the tensors aren't that model's.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or ["none"])[0]
    cls = getattr(transformers, name, None)
    if cls is None:
        raise CheckpointError(
            f"A model of architecture {name} can't be made here: transformers has no such class.",
            fix="evaluate: {..., given: state_dict}",
        )
    model, problems = read_state_dict(cls, config, tensors)
    if model is None or problems:
        raise KeyMismatch(f"The candidate doesn't load as a {name}.", *problems[:8])
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    made: Any = model
    return made.eval()


def pipeline_from(folder: Path, model: Any) -> Any:
    """The pipeline around a model, with the tokenizer and processors of the folder.

    Raises
        ParameterError: no pipeline runs such a model.
    """
    task = infer_task(model.config)
    parts = {
        part: str(folder)
        for part, files in _PARTS.items()
        if any((folder / file).is_file() for file in files)
    }
    return pipeline_around(task, model, **parts)
