"""lorasmith: one frozen base, many small tasks.

LoRA (W = W0 + (alpha/rank) · B @ A) from the first plan to serving hundreds of adapters.
Names are imported when they are first used, so `import lorasmith` is instant.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ROOM_OF = {
    "Adapter": "lora",
    "Factors": "lora",
    "LoRAConfig": "lora",
    "InjectReport": "inject",
    "eject": "inject",
    "extract": "inject",
    "inject": "inject",
    "merge": "inject",
    "merged": "inject",
    "switch": "inject",
    "unmerge": "inject",
    "Base": "bases",
    "load_base": "bases",
    "read_adapter": "formats",
    "write_adapter": "formats",
    "TrainConfig": "train",
    "TrainResult": "train",
    "train": "train",
    "Engine": "engine",
    "Request": "engine",
    "Result": "engine",
    "combine": "analysis",
    "extract_from_full": "analysis",
    "singular_values": "analysis",
    "truncate": "analysis",
    "LoraSmithError": "errors",
}

__all__ = [
    "Adapter",
    "Base",
    "Engine",
    "Factors",
    "InjectReport",
    "LoRAConfig",
    "LoraSmithError",
    "Request",
    "Result",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "combine",
    "eject",
    "extract",
    "extract_from_full",
    "inject",
    "load_base",
    "merge",
    "merged",
    "read_adapter",
    "singular_values",
    "switch",
    "train",
    "truncate",
    "unmerge",
    "write_adapter",
]

if TYPE_CHECKING:
    from lorasmith.analysis import combine, extract_from_full, singular_values, truncate
    from lorasmith.bases import Base, load_base
    from lorasmith.engine import Engine, Request, Result
    from lorasmith.errors import LoraSmithError
    from lorasmith.formats import read_adapter, write_adapter
    from lorasmith.inject import InjectReport, eject, extract, inject, merge, merged, switch, unmerge
    from lorasmith.lora import Adapter, Factors, LoRAConfig
    from lorasmith.train import TrainConfig, TrainResult, train


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'lorasmith' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lorasmith.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Keeps `lorasmith.inject` the verb: importing the room of the same name must not replace it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _ROOM_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
