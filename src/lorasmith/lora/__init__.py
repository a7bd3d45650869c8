"""The mathematics of LoRA on plain tensors: config, factors, initialisation, delta, merge arithmetic.

W = W0 + scaling · B @ A with W0 frozen, A random, B zero at the start (Hu et al., arXiv 2106.09685).
The value that passes between rooms is an `Adapter`: a config and a map from module path to `Factors`.

May import: errors.
"""

from lorasmith.lora.adapter import Adapter
from lorasmith.lora.blocks import Span, gather, group_spans, spread
from lorasmith.lora.config import BiasMode, InitName, LoRAConfig, pattern_matches
from lorasmith.lora.delta import add_delta, compute_dtype, delta, factors_of_rows
from lorasmith.lora.dora import dora_weight, rows_of
from lorasmith.lora.extras import Extras, TokenRows
from lorasmith.lora.factors import LINEAR, Factors, LayerKind, Layout
from lorasmith.lora.init import generator_for, init_factors
from lorasmith.lora.source import FileSource, file_source_of, set_file_source

__all__ = [
    "LINEAR",
    "Adapter",
    "BiasMode",
    "Extras",
    "Factors",
    "FileSource",
    "InitName",
    "LayerKind",
    "Layout",
    "LoRAConfig",
    "Span",
    "TokenRows",
    "add_delta",
    "compute_dtype",
    "delta",
    "dora_weight",
    "factors_of_rows",
    "file_source_of",
    "gather",
    "generator_for",
    "group_spans",
    "init_factors",
    "pattern_matches",
    "rows_of",
    "set_file_source",
    "spread",
]
