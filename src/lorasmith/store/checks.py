"""What an adapter must pass before it is a version, and each time it is read."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lorasmith.errors import AdapterFileError, BaseMismatchError, ConfigError
from lorasmith.formats import Problem, check_coverage, check_values, read_adapter, read_header
from lorasmith.lora import Adapter
from lorasmith.store.records import BaseFacts

ALLOWABLE = ("zero-factors", "extreme-scaling")


def refuse_problems(
    name: str, path: Path, adapter: Adapter, base: BaseFacts | None, allow: Collection[str]
) -> None:
    """The checks of `lorasmith check`, on the private copy."""
    unknown = [kind for kind in allow if kind not in ALLOWABLE]
    if unknown:
        raise ConfigError(f'"{unknown[0]}" cannot be allowed; {" and ".join(ALLOWABLE)} can.')
    if base is not None and base.match(adapter.provenance) is False:
        raise BaseMismatchError(f'"{name}" was trained on another base than {base.name}. Nothing was added.')
    problems: list[Problem] = [p for p in check_values(adapter) if p.kind not in allow]
    if base is not None:
        problems += check_coverage(read_header(path), base.shapes).problems
    if problems:
        lines = [f"  {p.kind}: {p.message}" for p in problems[:20]]
        more = [f"  … and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise AdapterFileError("\n".join([f'"{name}" was not added:', *lines, *more]))


def read_checked(path: Path, digest: str) -> Adapter:
    """The adapter in a stored directory.

    Raises:
        AdapterFileError: its content is not what its digest says.
    """
    adapter = read_adapter(path)
    if adapter.digest != digest:
        raise AdapterFileError(f"the stored adapter {digest} is damaged: add it again from its source.")
    return adapter
