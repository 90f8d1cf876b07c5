"""The words of the recipe language: its keys by level, its parameters, and where each belongs."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TOP_KEYS = _words("""
    merge_method base_model models slices modules parameters dtype out_dtype seed over
    config_from storage_options on_missing on_unequal on_shape_mismatch passthrough name merge
    tokenizer tokenizer_source chat_template
""")
FORMULA_KEYS = _words("""
    merge models dtype out_dtype seed config_from storage_options on_missing on_unequal
    on_shape_mismatch name tokenizer tokenizer_source chat_template
""")
"""Keys of a recipe that says `merge:`."""
NOT_WITH_FORMULAS = {
    "merge_method": "write the method in the formula, NAME(models=[...])",
    "parameters": "write them in the formula, NAME(models=[...], weight=0.5)",
    "base_model": "write base=NAME in the formula; 'config_from:' names who gives the config",
    "slices": "give them a document with a 'name:', and use that in the formula",
    "modules": "give them a document with a 'name:', and use that in the formula",
    "over": "write over='model' in the formula",
    "passthrough": "write passthrough=[...] in the formula",
}
"""What a formula says itself, and how."""
SPACE_KEYS = ("combinations", "grid", "zip", "list", "sample", "exclude")
"""What a sweep tries, each a key beside the recipe's own."""
EVALUATION_KEYS = ("evaluate", "keep")
"""How a sweep tells its candidates apart."""
SWEPT = frozenset({*SPACE_KEYS, *EVALUATION_KEYS})
MODEL_KEYS = frozenset({"model", "parameters", "rename"})
SLICE_KEYS = frozenset({"sources", "base_model", "parameters"})
MODULE_KEYS = frozenset({"models", "slices", "parameters"})
REFERENCE_KEYS = frozenset({"path", "revision", "model", "lora", "rename"})
CHOICE_KEYS = frozenset({"filter", "value"})

NEEDLESS = frozenset({"override_architecture"})
"""Says how mergekit should read a model; here the names in its files are enough."""

LANGUAGE_PARAMETERS = _words("""
    weight density normalize rescale lambda int8_mask gamma epsilon t select_topk
    filter_wise scale max_iter tol nuslerp_row_wise nuslerp_flatten normalize_weights eps r
    alpha over residual_weight sign_weighting
""")
"""Parameters that some method of the recipe language has."""
MERGEKIT_METHODS = _words("""
    linear slerp nuslerp multislerp karcher task_arithmetic ties dare_ties dare_linear
    della della_linear breadcrumbs breadcrumbs_ties sce ram ramplus_tl model_stock nearswap
    arcee_fusion passthrough
""")
MERGEKIT_MOE = ("experts", "gate_mode")
"""Keys by which the files of mergekit-moe are known, another program of mergekit's."""
CALL_NAMES = {
    "k": "density",
    "p": "density",
    "tau": "t",
    "weights": "weight",
    "signs": "weight",
    "scaling": "lambda",
}
"""How Python calls spell a parameter, and what recipes call it."""

TASK_VECTOR_METHODS = _words("""
    task_arithmetic ties breadcrumbs breadcrumbs_ties dare_linear dare_ties della della_linear sce
""")
ELSEWHERE = {
    "path": "in 'model: {path: ..., revision: ...}'",
    "revision": "in 'model: {path: ..., revision: ...}', or in 'model: name@revision'",
    "lora": "in 'model: {model: ..., lora: ...}', or in 'model: name+adapter'",
    "rename": "beside 'model:', or in 'base_model: {path: ..., rename: ...}'",
    "model": "in an item of 'models:' or 'sources:'",
    "pad_to_multiple_of": "under 'tokenizer:'",
    "tokens": "under 'tokenizer:'",
    "source": "under 'tokenizer:'",
    "sources": "under 'slices:'",
    "layer_range": "in an item of 'sources:', under 'slices:'",
    "filter": "in an item of a parameter's list",
    "value": "in an item of a parameter's list",
}
