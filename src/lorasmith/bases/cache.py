"""Write cached things so that no reader ever sees half of one.

Layout under `home()`:

    bases/<entry>/            a converted base, with `manifest.json` beside its files
    bases/.<entry>.lock       held while an entry is built
    wheels/                   wheels that a user brought by hand
    fingerprints.json         content digests by file path, size and time
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lorasmith.errors import OutputError
from lorasmith.native import home

MANIFEST = "manifest.json"
CHUNK_BYTES = 4 << 20


def sha256_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file, read in pieces of `CHUNK_BYTES`."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def build_once(entry: str, build: Callable[[Path], None]) -> Path:
    """Return `home()/bases/entry`, built at most once across all processes.

    Args:
        entry: Folder name. It should change when the recipe of `build` does.
        build: Fills an empty folder. What it raises reaches the caller, and nothing is kept.

    Raises:
        OutputError: The cache folder cannot be written.
    """
    target = home() / "bases" / entry
    # Looked at before locking, so that a cache on a read-only disk can be used.
    if is_intact(target):
        return target
    with _locked(target.parent / f".{entry}.lock"):
        if not is_intact(target):
            _sweep(target)
            _build(target, build)
    return target


def is_intact(directory: Path) -> bool:
    """Say whether every file in the manifest is there with its size; a touched file is hashed again."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        return all(_is_file_intact(directory / name, record) for name, record in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step: readers see the old text or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(value, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import filelock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path)
        lock.acquire()
    except OSError as error:
        raise OutputError(
            f"the cache folder {path.parent} cannot be written: {error}.\n"
            "  set LORASMITH_HOME to a folder that can."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _build(target: Path, build: Callable[[Path], None]) -> None:
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.building-"))
    try:
        build(temporary)
        _seal(temporary)
        _replace_directory(temporary, target)
    except OSError as error:
        raise OutputError(f"{target} could not be written: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _seal(directory: Path) -> None:
    """Write the manifest last, after every other byte is on the disk."""
    files = {}
    for path in sorted(p for p in directory.iterdir() if p.is_file()):
        path.chmod(0o644)  # safetensors writes 0600, and a cache may be shared
        _fsync(path)
        stat = path.stat()
        files[path.name] = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_file(path)}
    write_json(directory / MANIFEST, {"files": files})
    for path, mode in ((directory / MANIFEST, 0o644), (directory, 0o755)):
        path.chmod(mode)
    _fsync(directory)


def _replace_directory(new: Path, target: Path) -> None:
    """Move `new` to `target`; a damaged old entry steps aside first, as a full folder can't be replaced."""
    if target.exists() or target.is_symlink():
        os.replace(target, tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.damaged-") + "/old")
    os.replace(new, target)
    _fsync(target.parent)
    _sweep(target)


def _sweep(target: Path) -> None:
    """Remove what killed builds left beside `target`. Only the holder of the lock may call this."""
    for kind in ("building", "damaged"):
        for left in target.parent.glob(f".{target.name}.{kind}-*"):
            shutil.rmtree(left, ignore_errors=True)


def _is_file_intact(path: Path, record: dict[str, Any]) -> bool:
    stat = path.stat()
    if stat.st_size != record["bytes"]:
        return False
    return bool(stat.st_mtime_ns == record["mtime_ns"] or sha256_file(path) == record["sha256"])


def _fsync(path: Path) -> None:
    """Flush a file, or the names in a folder; a folder can't be flushed on Windows, so that is skipped."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
