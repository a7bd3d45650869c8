"""Adapter files: PEFT's directory and MLX's in and out, GGUF out; read strictly, written atomically.

May import: lora, errors.
"""

from lorasmith.formats.check import Coverage, Problem, check_coverage, check_values
from lorasmith.formats.container import read_tensors
from lorasmith.formats.gguf_lora import GGUF_FILE_NAMES, write_gguf
from lorasmith.formats.header import FILE_NAMES, AdapterHeader, read_header
from lorasmith.formats.method_dir import METHOD_FILE, read_json
from lorasmith.formats.mlx_dir import MLX_FILE_NAMES, is_mlx, read_mlx, write_mlx
from lorasmith.formats.peft_dir import read_adapter, read_with_digest, write_adapter
from lorasmith.formats.peft_modules import ModuleHeader
from lorasmith.formats.portable import Folded, make_portable
from lorasmith.formats.publish import publish_directory
from lorasmith.formats.runtimes import RUNTIMES, Verdict, judge_gguf, judge_mlx, judge_peft, vllm_launch

__all__ = [
    "FILE_NAMES",
    "GGUF_FILE_NAMES",
    "METHOD_FILE",
    "MLX_FILE_NAMES",
    "RUNTIMES",
    "AdapterHeader",
    "Coverage",
    "Folded",
    "ModuleHeader",
    "Problem",
    "Verdict",
    "check_coverage",
    "check_values",
    "is_mlx",
    "judge_gguf",
    "judge_mlx",
    "judge_peft",
    "make_portable",
    "publish_directory",
    "read_adapter",
    "read_header",
    "read_json",
    "read_mlx",
    "read_tensors",
    "read_with_digest",
    "vllm_launch",
    "write_adapter",
    "write_gguf",
    "write_mlx",
]
