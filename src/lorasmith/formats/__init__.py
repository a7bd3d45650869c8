"""Adapter files: PEFT's directory format in and out, read strictly, written atomically.

May import: lora, errors.
"""

from lorasmith.formats.check import Coverage, Problem, check_coverage, check_values
from lorasmith.formats.header import AdapterHeader, ModuleHeader, read_header
from lorasmith.formats.peft_dir import read_adapter, read_with_digest, write_adapter

__all__ = [
    "AdapterHeader",
    "Coverage",
    "ModuleHeader",
    "Problem",
    "check_coverage",
    "check_values",
    "read_adapter",
    "read_header",
    "read_with_digest",
    "write_adapter",
]
