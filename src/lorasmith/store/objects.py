"""Adapter directories under their content digest: staged, published by one rename, leased, swept.

A lease is a shared lock (flock) on the object's directory. The kernel drops it when its process ends,
however it ends, so a lease needs no clock and leaves nothing to clean up.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from lorasmith.errors import AdapterFileError, ConfigError, OutputError, UnknownAdapterError
from lorasmith.store.names import is_digest

try:
    import fcntl
except ImportError as error:  # pragma: no cover
    raise ConfigError("the store needs POSIX file locks, which this system does not have") from error

FILE_NAMES = ("adapter_config.json", "adapter_model.safetensors", "lorasmith.json")
OPTIONAL_FILES = ("lorasmith.json",)
MAX_FILE_BYTES = 16 << 30
CHUNK_BYTES = 1 << 20


@dataclass(eq=False)
class Lease:
    """Keeps one object on disk until `release`, or until this process ends."""

    digest: str
    path: Path
    _descriptor: int | None = field(repr=False)
    _on_release: Callable[[str], object] = field(repr=False)

    def release(self) -> None:
        """Give it back; safe to call again."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
            self._on_release(self.digest)


@dataclass(frozen=True)
class Staged:
    """A private directory in the store; nobody else sees what is written there."""

    path: Path

    def write(self, name: str, pieces: Iterator[bytes], *, max_bytes: int = MAX_FILE_BYTES) -> int:
        """Write one file of the adapter durably; return its size.

        Raises:
            ConfigError: `name` is none of an adapter's files, or there are too many bytes.
        """
        if name not in FILE_NAMES:
            raise ConfigError(f'"{name[:80]}" is no file of an adapter: {", ".join(FILE_NAMES)}')
        descriptor = os.open(self.path / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        size = 0
        try:
            for piece in pieces:
                size += len(piece)
                if size > max_bytes:
                    raise ConfigError(f"{name} is larger than the {max_bytes:,} bytes that are allowed")
                _write_all(descriptor, piece)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return size

    def copy_from(self, source: Path) -> None:
        """Copy an adapter's files in; whatever else lies there stays behind."""
        for name in FILE_NAMES:
            if name not in OPTIONAL_FILES or (source / name).exists():
                self.write(name, _pieces(source / name))


class Objects:
    """The directories of one store."""

    def __init__(self, root: Path) -> None:
        self.objects = root / "objects"
        self.staging = root / "staging"
        for folder in (self.objects, self.staging):
            folder.mkdir(parents=True, exist_ok=True)
        _sync(root)

    def path(self, digest: str) -> Path:
        """Where the object lies, if it is there."""
        return self.objects / digest

    def digests(self) -> list[str]:
        """All objects on disk, wanted or not."""
        return sorted(entry.name for entry in self.objects.iterdir() if is_digest(entry.name))

    @contextmanager
    def stage(self) -> Iterator[Staged]:
        """A directory for a copy; it is gone afterwards unless it was published."""
        path, descriptor = self._locked_directory()
        try:
            yield Staged(path)
        finally:
            shutil.rmtree(path, ignore_errors=True)
            os.close(descriptor)

    def publish(self, staged: Staged, digest: str, *, replace: bool = False) -> None:
        """Make the copy visible under its digest, by one rename. One that is there already stays."""
        target = self.path(digest)
        if target.is_dir():
            if not replace:
                return
            os.rename(target, self._trash_path())
        for file in staged.path.iterdir():
            os.chmod(file, 0o444)
        _sync(staged.path)
        os.rename(staged.path, target)
        _sync(self.objects)

    def lease(self, digest: str, on_release: Callable[[str], object]) -> Lease:
        """Hold an object.

        Raises:
            UnknownAdapterError: it is not there.
        """
        path = self.path(digest)
        descriptor = _lock(path, fcntl.LOCK_SH)
        if descriptor is None:
            raise UnknownAdapterError(f"the store holds no adapter with digest {digest}.")
        return Lease(digest, path, descriptor, on_release)

    def discard(self, digest: str) -> bool:
        """Take an object out of sight, unless somebody holds it. `sweep` deletes it."""
        path = self.path(digest)
        descriptor = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if descriptor is None:
            return False
        try:
            os.rename(path, self._trash_path())
            return True
        finally:
            os.close(descriptor)

    def sweep(self) -> None:
        """Delete what was discarded, and copies whose process died."""
        for entry in self.staging.iterdir():
            descriptor = _lock(entry, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if descriptor is not None:
                shutil.rmtree(entry, ignore_errors=True)
                os.close(descriptor)

    def _locked_directory(self) -> tuple[Path, int]:
        """A new directory whose lock tells `sweep` that somebody is at work."""
        while True:
            path = self.staging / secrets.token_hex(8)
            path.mkdir(mode=0o700)
            descriptor = _lock(path, fcntl.LOCK_SH)
            if descriptor is not None:  # None: a sweep came between
                return path, descriptor

    def _trash_path(self) -> Path:
        return self.staging / f"{secrets.token_hex(8)}.removed"


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the file system says into `OutputError`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error
        raise OutputError(f"{path} cannot be written: {reason}. Nothing was changed.") from error


def _lock(path: Path, kind: int) -> int | None:
    """An open, locked descriptor of the directory that is at `path` now; None if it is gone or held."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, kind)
        # Another process may have renamed it away while this one waited for the lock.
        if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        # Non-blocking, so that a pipe under an adapter's name cannot make the store wait.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error.strerror}. Nothing was added.") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise AdapterFileError(f"{path} is not a regular file. Nothing was added.")
        while piece := os.read(descriptor, CHUNK_BYTES):
            yield piece
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync(folder: Path) -> None:
    with suppress(PermissionError):  # a store on a read-only place can still be read
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
