"""Put a finished directory in its place, at once or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from lorasmith.errors import OutputError


def publish_directory(path: Path, fill: Callable[[Path], None], *, replaceable: Iterable[str]) -> None:
    """Let `fill` write into a temporary sibling of `path`, make it durable, and rename it to `path`.

    A directory that is there already gives way only if it holds nothing but `replaceable` files.
    It is renamed away first and deleted last, so at every instant a complete copy exists.

    Raises:
        OutputError: `path` cannot be written, or holds something else.
    """
    path = Path(os.path.realpath(path))
    token = secrets.token_hex(4)
    fresh, old = (path.with_name(f".{path.name}.{token}.{kind}") for kind in ("new", "old"))
    try:
        _check_replaceable(path, set(replaceable))
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        fill(fresh)
        for file in [*fresh.iterdir(), fresh]:
            _sync(file)
        _exchange(path, fresh, old)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(path: Path, replaceable: set[str]) -> None:
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise OutputError(f"{path} is a file; choose another place.")
    others = sorted(entry.name for entry in path.iterdir() if entry.name not in replaceable or entry.is_dir())
    if others:
        raise OutputError(
            f"{path} would be replaced, and it also holds {', '.join(others[:5])}"
            f"{', …' if len(others) > 5 else ''}. Choose another place, or move that away."
        )


def _exchange(path: Path, fresh: Path, old: Path) -> None:
    if path.exists():
        os.rename(path, old)
        try:
            os.rename(fresh, path)
        except OSError:
            os.rename(old, path)
            raise
    else:
        os.rename(fresh, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return  # elsewhere directories cannot be opened
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
