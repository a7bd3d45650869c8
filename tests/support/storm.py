"""benchmarks/fleet_kills.py, whose short form the tests run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any


def load_storm() -> Any:
    path = Path(__file__).parents[2] / "benchmarks/fleet_kills.py"
    spec = importlib.util.spec_from_file_location("fleet_kills", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
