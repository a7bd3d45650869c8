"""From a `model` text to weights in the engine: resolved in the store, checked, loaded once, leased.

The engine knows adapters by their digest only, so an alias that moves can never reach other weights.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lorasmith.bases import Fingerprint, match_base
from lorasmith.engine import Engine
from lorasmith.errors import (
    AdapterFileError,
    BaseMismatchError,
    LoraSmithError,
    UnknownAdapterError,
)
from lorasmith.server.names import Names, plain
from lorasmith.store import Lease, Store


class Adapters(Names):
    """Names, and what they mean in the engine. Thread-safe.

    Args:
        fingerprint: of the base; None where it came from no directory, and then nothing can be compared.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store,
        *,
        base_id: str,
        fingerprint: Fingerprint | None,
        allow_base_mismatch: bool,
        max_adapters: int,
    ) -> None:
        super().__init__(store, base_id=base_id)
        self._engine = engine
        self._fingerprint = fingerprint
        self._allow_base_mismatch = allow_base_mismatch
        self._max_adapters = max_adapters
        self._lock = threading.Lock()
        self._loading: dict[str, threading.Lock] = {}
        self._loaded: OrderedDict[str, Lease] = OrderedDict()
        self._holds: Counter[str] = Counter()

    def load(self, digest: str, base: dict[str, Any] | None) -> None:
        """Make the engine know this adapter. Blocks while it is read.

        Raises:
            AdapterFileError, BaseMismatchError: it cannot be served.
            UnknownAdapterError: it was removed meanwhile.
        """
        with self._lock:
            if digest in self._withdrawn:
                raise UnknownAdapterError("this adapter was unloaded")
            if digest in self._loaded:
                self._loaded.move_to_end(digest)
                return
            gate = self._loading.setdefault(digest, threading.Lock())
        with gate:
            with self._lock:
                if digest in self._loaded:
                    return
            lease = self._read_in(digest, base)
            with self._lock:
                self._loaded[digest] = lease
                self._loading.pop(digest, None)
                is_withdrawn = digest in self._withdrawn
        if is_withdrawn:  # while it was read
            self.unload(digest)
            raise UnknownAdapterError("this adapter was unloaded")
        self._shed()

    @contextmanager
    def held(self, digest: str | None, base: dict[str, Any] | None) -> Iterator[None]:
        """Load an adapter, and keep it until the engine was given a request for it. None is the plain base.

        Raises:
            As `load`.
        """
        if digest is None:
            yield
            return
        with self._lock:
            self._holds[digest] += 1
        try:
            self.load(digest, base)
            yield
        finally:
            with self._lock:
                self._holds[digest] -= 1
                self._holds += Counter()  # drops those at zero
            self._shed()

    def is_loaded(self, digest: str | None) -> bool:
        """Whether nothing has to be read for it."""
        with self._lock:
            return digest is None or digest in self._loaded

    def unload(self, digest: str, *, withdraw: bool = True) -> None:
        """Forget an adapter: running requests finish, new ones are told it does not exist."""
        with self._lock:
            if withdraw:
                self._withdrawn.add(digest)
            lease = self._forget(digest)
        if lease is not None:
            lease.release()

    @property
    def loaded(self) -> list[str]:
        """Digests that the engine knows."""
        with self._lock:
            return list(self._loaded)

    def sweep(self) -> None:
        """Forget adapters that the store no longer has, so that their files can go."""
        loaded = self.loaded  # first: what is added and loaded from here on is not meant
        wanted = self.store.digests()
        for digest in loaded:
            if digest not in wanted:
                self.unload(digest, withdraw=False)

    def close(self) -> None:
        """Give all leases back."""
        for digest in self.loaded:
            self.unload(digest, withdraw=False)

    def preload(self, report: Callable[[str, LoraSmithError | None], None]) -> None:
        """Load what aliases point to, as far as it fits, and report each."""
        for alias in self.store.aliases()[: self._max_adapters]:
            try:
                version = self.store.resolve(f"{alias.alias}@{alias.version}")
                self.load(version.digest, plain(version.base))
                report(alias.alias, None)
            except LoraSmithError as error:
                report(alias.alias, error)

    def _read_in(self, digest: str, base: dict[str, Any] | None) -> Lease:
        self._check_base(base)
        lease = self.store.lease(digest)
        try:
            found = self._engine.add_adapter(digest, lease.path)
            if found != digest:
                self._engine.remove_adapter(digest)
                raise AdapterFileError(f"the stored adapter {digest} is damaged: its content is {found}")
        except BaseException as error:
            lease.release()
            if isinstance(error, AdapterFileError):  # a client need not know where it lies
                raise AdapterFileError(str(error).replace(str(lease.path), digest)) from None
            raise
        return lease

    def _check_base(self, base: dict[str, Any] | None) -> None:
        if self._allow_base_mismatch or self._fingerprint is None or base is None:
            return
        if match_base({"base": base}, self._fingerprint) is False:
            raise BaseMismatchError(f"this adapter was trained on another base than {self.base_id}")

    def _shed(self) -> None:
        """Forget the least recently used beyond `max_adapters`; whoever runs on them keeps them."""
        while True:
            with self._lock:
                idle = (d for d in self._loaded if not self._holds[d])
                digest = next(idle, None) if len(self._loaded) > self._max_adapters else None
                lease = None if digest is None else self._forget(digest)
            if lease is None:
                return
            lease.release()

    def _forget(self, digest: str) -> Lease | None:
        """Under the lock, so that nobody who holds or loads it meanwhile finds it half gone."""
        lease = self._loaded.pop(digest, None)
        if lease is not None:
            self._engine.remove_adapter(digest)
        return lease
