"""Adapter files: PEFT's directory format in and out, read strictly, written atomically.

May import: lora, errors.
"""

from lorasmith.formats.check import Coverage, Problem, check_coverage, check_values
from lorasmith.formats.header import AdapterHeader, read_header
from lorasmith.formats.peft_dir import read_adapter, write_adapter
from lorasmith.formats.peft_modules import ModuleHeader

__all__ = [
    "AdapterHeader",
    "Coverage",
    "ModuleHeader",
    "Problem",
    "check_coverage",
    "check_values",
    "read_adapter",
    "read_header",
    "write_adapter",
]
