"""Each room imports what its docstring says, public names are the agreed ones, and importing is instant."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lorasmith

SOURCE = Path(lorasmith.__file__).parent
ROOMS = sorted(p.parent.name for p in SOURCE.glob("*/__init__.py"))

PUBLIC = {
    "Adapter", "Base", "Engine", "Factors", "InjectReport", "LoRAConfig", "LoraSmithError", "Request", "Result",
    "TrainConfig", "TrainResult", "__version__", "combine", "eject", "extract", "extract_from_full", "inject",
    "load_base", "merge", "merged", "read_adapter", "singular_values", "switch", "train", "truncate", "unmerge",
    "write_adapter",
}  # fmt: skip


def imported_rooms(room: str) -> set[str]:
    found = set()
    for file in (SOURCE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
                if node.module == "lorasmith":
                    names = [f"lorasmith.{alias.name}" for alias in node.names]
            found |= {n.split(".")[1] for n in names if n.startswith("lorasmith.")}
    return found - {room}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_its_docstring_says(room):
    docstring = ast.get_docstring(ast.parse((SOURCE / room / "__init__.py").read_text()))
    allowed = re.search(r"May import: ([\w,\s]+)", docstring)
    assert allowed, f"{room} does not say what it may import"
    assert imported_rooms(room) <= set(re.findall(r"\w+", allowed.group(1)))


@pytest.mark.parametrize("room", ROOMS)
def test_another_room_is_imported_through_its_front_door(room):
    for file in (SOURCE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            parts = node.module.split(".") if isinstance(node, ast.ImportFrom) and node.module else []
            if parts[:1] == ["lorasmith"] and len(parts) > 2:
                assert parts[1] == room, f"{file.name} reaches into {node.module}"


def test_public_names():
    assert set(lorasmith.__all__) == PUBLIC == {*lorasmith._ROOM_OF, "__version__"}
    for name in PUBLIC:
        assert getattr(lorasmith, name) is not None


def test_a_verb_stays_a_verb_when_the_room_of_its_name_is_imported():
    importlib.import_module("lorasmith.inject")
    importlib.import_module("lorasmith.train")
    assert callable(lorasmith.inject)
    assert callable(lorasmith.train)
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = lorasmith.nope


@pytest.mark.parametrize("module", ["lorasmith", "lorasmith.cli"])
def test_importing_loads_neither_torch_nor_transformers(module):
    script = f"import {module}, sys; print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
