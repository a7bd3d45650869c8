"""A name becomes a frozen base model, its tokenizer and chat template, its fingerprint.

May import: lora, native, quantised, errors
"""

from lorasmith.bases.attention import AttentionFunction, attention, attention_inputs
from lorasmith.bases.builtin import BUILTINS, Builtin, builtin_directory
from lorasmith.bases.fingerprint import Fingerprint, fingerprint_directory
from lorasmith.bases.headers import TensorHeader, read_headers
from lorasmith.bases.load import (
    Base,
    base_directory,
    dtype_reason,
    load_base,
    load_tokenizer,
    match_base,
    pick_dtype,
    require_base,
    write_base,
)
from lorasmith.bases.skeleton import Skeleton, load_skeleton
from lorasmith.native import home

__all__ = [
    "BUILTINS",
    "AttentionFunction",
    "Base",
    "Builtin",
    "Fingerprint",
    "Skeleton",
    "TensorHeader",
    "attention",
    "attention_inputs",
    "base_directory",
    "builtin_directory",
    "dtype_reason",
    "fingerprint_directory",
    "home",
    "load_base",
    "load_skeleton",
    "load_tokenizer",
    "match_base",
    "pick_dtype",
    "read_headers",
    "require_base",
    "write_base",
]
