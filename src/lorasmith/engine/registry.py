"""Adapters by name: immutable generations identified by content digest, leased by requests.

A name points to a generation; replacing or removing the name never touches a request that already runs.
A generation that came from a directory may leave memory when nobody uses it, and comes back on demand.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorasmith.errors import AdapterFileError, UnknownAdapterError, did_you_mean
from lorasmith.formats import read_with_digest
from lorasmith.lora import Adapter

LOADING_THREADS = min(4, os.cpu_count() or 1)  # more than cores queue for the interpreter lock


@dataclass(eq=False)
class Generation:
    """One immutable adapter.

    Attributes:
        adapter: None while its weights are on disk only.
        why_alone: what keeps it out of mixed batches; None if it can share them.
    """

    digest: str
    adapter: Adapter | None
    path: Path | None
    num_bytes: int
    why_alone: str | None = None
    leases: int = 0
    last_used: int = 0
    names: set[str] = field(default_factory=set)
    loading: threading.Lock = field(default_factory=threading.Lock)


class Registry:
    """Thread-safe. Reading files and checking shapes happen in the caller's thread, outside the lock.

    Args:
        check: refuses an adapter that does not fit the base; says why it cannot share a batch, if so.
        max_bytes: of factors in memory, as far as idle ones can be read again; None is no limit.
    """

    def __init__(self, check: Callable[[Adapter], str | None], max_bytes: int | None = None) -> None:
        self._check = check
        self._max_bytes = max_bytes
        self._lock = threading.RLock()
        self._names: dict[str, Generation] = {}
        self._by_digest: dict[str, Generation] = {}
        self._clock = 0

    def add(self, name: str, adapter_or_path: Adapter | str | Path) -> str:
        """Point `name` to an adapter; return its digest. Whoever runs on the old one keeps it.

        Raises:
            AdapterFileError: it cannot be read or does not fit the base; the name is what it was.
        """
        return self._publish(name, self._prepare(adapter_or_path))

    def add_all(self, adapters: Mapping[str, Adapter | str | Path]) -> dict[str, str]:
        """`add` for many, read by several threads (hashing and reading leave Python's lock).

        Raises:
            AdapterFileError: one cannot be used; then no name was changed.
        """
        with ThreadPoolExecutor(min(LOADING_THREADS, max(1, len(adapters)))) as pool:
            prepared = list(pool.map(self._prepare, adapters.values()))
        return {name: self._publish(name, g) for name, g in zip(adapters, prepared, strict=True)}

    def _prepare(self, adapter_or_path: Adapter | str | Path) -> Generation:
        if isinstance(adapter_or_path, Adapter):
            reason = self._check(adapter_or_path)
            # An adapter object may be edited in place by its owner; a generation may not.
            kept = _copied(adapter_or_path)
            return Generation(kept.digest, kept, None, kept.num_bytes, reason)
        adapter, digest = read_with_digest(adapter_or_path)
        reason = self._check(adapter)
        generation = Generation(digest, adapter, Path(adapter_or_path), adapter.num_bytes, reason)
        if self._max_bytes is not None and self.resident_bytes + generation.num_bytes > self._max_bytes:
            generation.adapter = None  # it comes back on demand; many at once must not overrun the limit
        return generation

    def _publish(self, name: str, prepared: Generation) -> str:
        digest = prepared.digest
        with self._lock:
            generation = self._by_digest.setdefault(digest, prepared)
            if generation.adapter is None:
                generation.adapter = prepared.adapter
            # The newest place is the one that is most likely still there; an object has none, and stays.
            if generation.path is not None:
                generation.path = prepared.path
            self._touch(generation)
            old = self._names.get(name)
            self._names[name] = generation
            generation.names.add(name)
            if old is not None and old is not generation:
                self._release_name(old, name)
            self._evict(keep=generation)
        return digest

    def remove(self, name: str) -> None:
        """Forget a name. The weights go when the last request that uses them ends."""
        with self._lock:
            self._release_name(self._names.pop(self._known(name)), name)

    def lease(self, name_or_digest: str) -> Generation:
        """The generation behind a name or digest, in memory, held until `release`.

        Raises:
            UnknownAdapterError: nobody registered it.
            AdapterFileError: its files are gone or changed since it was registered.
        """
        with self._lock:
            generation = self._find(name_or_digest)
            generation.leases += 1
            self._touch(generation)
        try:
            self._load(generation)
        except BaseException:
            self.release(generation)
            raise
        return generation

    def release(self, generation: Generation) -> None:
        """Give back a lease."""
        with self._lock:
            generation.leases -= 1
            self._forget_if_unused(generation)
            self._evict(keep=None)

    def names(self) -> dict[str, str]:
        """Name → digest."""
        with self._lock:
            return {name: generation.digest for name, generation in self._names.items()}

    def reasons(self) -> dict[str, str]:
        """Name → why its adapter shares no batch, for those that do not."""
        with self._lock:
            return {name: g.why_alone for name, g in self._names.items() if g.why_alone is not None}

    @property
    def resident_bytes(self) -> int:
        """Of the factors in memory."""
        with self._lock:
            return sum(g.num_bytes for g in self._by_digest.values() if g.adapter is not None)

    def _find(self, name_or_digest: str) -> Generation:
        found = self._names.get(name_or_digest)
        if found is None and (found := self._by_digest.get(name_or_digest)) and not found.names:
            found = None  # a removed name must not live on through its digest
        return found if found is not None else self._names[self._known(name_or_digest)]

    def _known(self, name: str) -> str:
        if name in self._names:
            return name
        there = ", ".join(sorted(self._names)[:12]) or "none"
        raise UnknownAdapterError(
            f'no adapter "{name}" is registered (there are: {there}).{did_you_mean(name, self._names)}'
        )

    def _load(self, generation: Generation) -> None:
        with generation.loading:
            path = generation.path
            if generation.adapter is not None or path is None:
                return
            adapter, digest = read_with_digest(path)
            if digest != generation.digest:
                raise AdapterFileError(
                    f"{path} changed since it was registered: digest {generation.digest[:12]}… then, "
                    f"{digest[:12]}… now. Register it again to serve the new weights."
                )
            with self._lock:
                generation.adapter = adapter
                self._evict(keep=generation)

    def _release_name(self, generation: Generation, name: str) -> None:
        generation.names.discard(name)
        self._forget_if_unused(generation)

    def _forget_if_unused(self, generation: Generation) -> None:
        if generation.leases == 0 and not generation.names:
            self._by_digest.pop(generation.digest, None)

    def _touch(self, generation: Generation) -> None:
        self._clock += 1
        generation.last_used = self._clock

    def _evict(self, keep: Generation | None) -> None:
        """Drop the weights of the least recently used idle generations that can be read again."""
        if self._max_bytes is None:
            return
        idle = [
            g
            for g in self._by_digest.values()
            if g.adapter is not None and g.path is not None and g.leases == 0 and g is not keep
        ]
        resident = sum(g.num_bytes for g in self._by_digest.values() if g.adapter is not None)
        for generation in sorted(idle, key=lambda g: g.last_used):
            if resident <= self._max_bytes:
                return
            generation.adapter = None
            resident -= generation.num_bytes


def _copied(adapter: Adapter) -> Adapter:
    factors = {path: f.clone() for path, f in adapter.factors.items()}
    biases = {path: bias.detach().clone() for path, bias in adapter.biases.items()}
    return replace(
        adapter,
        factors=factors,
        biases=biases,
        provenance=dict(adapter.provenance),
        extras=adapter.extras.to(),
    )
