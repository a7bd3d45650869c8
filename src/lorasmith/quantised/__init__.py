"""Frozen weights in 4 or 8 bits, given back in full for the length of one product.

`nf4` is QLoRA's format (arXiv 2305.14314): codes of four bits, one scale for each block of 64, and the
scales themselves in eight bits. `int8` has one scale for each output feature. Quantising a model
changes its linear layers in place; what they hold stays frozen for good.

May import: lora, native, errors.
"""

from lorasmith.quantised.codes import (
    NF4_BLOCK,
    NF4_VALUES,
    dequantise_int8,
    dequantise_nf4,
    quantise_int8,
    quantise_nf4,
)
from lorasmith.quantised.layer import QuantisedLinear
from lorasmith.quantised.model import (
    KINDS,
    Quantisation,
    dequantise_linears,
    predicted_quantisation,
    quantisation_of,
    quantise_linears,
    require_kind,
    stored_bytes,
)

__all__ = [
    "KINDS",
    "NF4_BLOCK",
    "NF4_VALUES",
    "Quantisation",
    "QuantisedLinear",
    "dequantise_int8",
    "dequantise_linears",
    "dequantise_nf4",
    "predicted_quantisation",
    "quantisation_of",
    "quantise_int8",
    "quantise_linears",
    "quantise_nf4",
    "require_kind",
    "stored_bytes",
]
