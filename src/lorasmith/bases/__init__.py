"""A name becomes a frozen base model, its tokenizer and chat template, its fingerprint.

May import: lora, errors
"""

from .builtin import BUILTINS, Builtin, builtin_directory
from .fingerprint import Fingerprint, fingerprint_directory
from .headers import TensorHeader, read_headers
from .load import Base, dtype_reason, load_base, pick_dtype

__all__ = [
    "BUILTINS",
    "Base",
    "Builtin",
    "Fingerprint",
    "TensorHeader",
    "builtin_directory",
    "dtype_reason",
    "fingerprint_directory",
    "load_base",
    "pick_dtype",
    "read_headers",
]
