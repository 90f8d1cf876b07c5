"""The one bridge to transformers: pipelines in, weights out, weights in, and the load check.

    options.py      keywords of older versions -> today's
    tasks.py        config -> the task of its pipeline
    pipelines.py    name -> pipeline, weights -> pipeline
    modules.py      module -> parameters, weights -> module
    from_folder.py  weights in memory and a folder of all else -> model, pipeline
    perplexity.py   a causal model, texts -> nats per token
    state_dict.py   tensors in a file's layout -> a model, as from_pretrained reads them
    layouts.py      keys -> which of them transformers joins or cuts
    load_check.py   headers -> what from_pretrained would complain about

transformers itself is imported inside functions, when it is first needed.
"""

from distmerge.huggingface.load_check import check_loads
from distmerge.huggingface.modules import load_into, parameters, to_module
from distmerge.huggingface.pipelines import like_pipeline, load_pipeline, to_pipeline
from distmerge.huggingface.tasks import infer_task

__all__ = [
    "check_loads",
    "infer_task",
    "like_pipeline",
    "load_into",
    "load_pipeline",
    "parameters",
    "to_module",
    "to_pipeline",
]
