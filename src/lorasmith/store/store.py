"""`Store`: adapters under names, with versions, aliases, canaries, rollback, leases and an audit log."""

from __future__ import annotations

import getpass
import json
import math
import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorasmith.errors import AdapterFileError, ConfigError, OutputError
from lorasmith.formats import read_adapter, read_header
from lorasmith.lora import Adapter
from lorasmith.store.catalog import Catalog
from lorasmith.store.checks import read_checked, refuse_problems
from lorasmith.store.database import Database
from lorasmith.store.names import check_name, split_model
from lorasmith.store.objects import Lease, Objects, Staged, explained
from lorasmith.store.records import Alias, BaseFacts, Version

DATABASE_NAME = "registry.sqlite"


class Store(Catalog):
    """A registry in a directory. Any number of threads and processes may use it at once.

    Args:
        path: made if it is not there.
        create: whether it may be made.
        actor: who the audit log names.

    Raises:
        ConfigError: there is no store, and none may be made.
        OutputError: the directory cannot be written, or holds another format.
    """

    def __init__(self, path: str | Path, *, create: bool = True, actor: str | None = None) -> None:
        self.root = Path(path)
        if not create and not (self.root / DATABASE_NAME).is_file():
            raise ConfigError(f"{path} is no store. `lorasmith store add` makes one.")
        with explained(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            self._objects = Objects(self.root)
        super().__init__(Database(self.root / DATABASE_NAME, actor or _me()))

    def close(self) -> None:
        """Close the database. Leases live on."""
        self._db.close()

    def path(self, digest: str) -> Path:
        """The directory of an adapter; hold a lease while it is read."""
        return self._objects.path(digest)

    def lease(self, digest: str) -> Lease:
        """Keep an adapter's files, even if its last version is removed, until the lease is released.

        Raises:
            UnknownAdapterError: the store does not hold it.
        """
        return self._objects.lease(digest, self._after_release)

    def read(self, digest: str) -> Adapter:
        """The adapter itself, its content compared with its digest.

        Raises:
            AdapterFileError: the files are damaged.
        """
        lease = self.lease(digest)
        try:
            return read_checked(lease.path, digest)
        finally:
            lease.release()

    def add(
        self,
        name: str,
        source: str | Path,
        *,
        base: BaseFacts | None = None,
        allow: Collection[str] = (),
        promote: bool = True,
    ) -> Version:
        """Copy an adapter in, check the copy, and make it the next version of `name`.

        Content that is a version of `name` already becomes no second one, so that adding may be repeated.

        Args:
            source: an adapter directory.
            base: what it must fit; None checks the adapter alone.
            allow: kinds of problems to accept: `"zero-factors"`, `"extreme-scaling"`.
            promote: whether the alias `name` moves to it. It always does if there is none yet.

        Raises:
            AdapterFileError: it is damaged, does not fit, or has no effect; then nothing was added.
            BaseMismatchError: it was trained on another base.
            OutputError: the store cannot be written; then nothing was added.
        """
        check_name(name)
        read_header(source)  # so that faults are told with the path that was given
        with explained(self.root), self._objects.stage() as staged:
            staged.copy_from(Path(source))
            return self.add_staged(name, staged, base=base, allow=allow, promote=promote)

    @contextmanager
    def stage(self) -> Iterator[Staged]:
        """A private directory to write an adapter's files into, for `add_staged`."""
        with explained(self.root), self._objects.stage() as staged:
            yield staged

    def add_staged(
        self,
        name: str,
        staged: Staged,
        *,
        base: BaseFacts | None = None,
        allow: Collection[str] = (),
        promote: bool = True,
    ) -> Version:
        """`add` for files that were written to a `stage`."""
        check_name(name)
        try:
            adapter = read_adapter(staged.path)
        except AdapterFileError as error:  # where the private copy lies is nobody's business
            raise AdapterFileError(str(error).replace(str(staged.path), f'"{name}"')) from None
        refuse_problems(name, staged.path, adapter, base, allow)
        try:
            number = self._add(name, staged, adapter, promote)
        except OutputError:
            with suppress(OutputError):
                self.collect()  # the copy may be in place already, unknown to the registry
            raise
        return next(v for v in self.versions(name) if v.version == number)

    def _add(self, name: str, staged: Staged, adapter: Adapter, promote: bool) -> int:
        digest = adapter.digest
        is_damaged = self.path(digest).is_dir() and not self._is_intact(digest)
        with self._db.write() as db:
            self._refuse_alias_of_another(name)
            # Inside the transaction, so that `collect` in another process cannot come between.
            self._objects.publish(staged, digest, replace=is_damaged)
            version = self._live_version_of(name, digest)
            if version is None:
                version = self._next_version(name)
                noted = adapter.provenance.get("base")
                base = json.dumps(noted) if isinstance(noted, dict) else None
                db.read(
                    "INSERT INTO versions (name, version, digest, base, added_at) VALUES (?,?,?,?,?)",
                    (name, version, digest, base, time.time()),
                )
                db.log("add", name, version, digest)
            if promote or not self._alias_row(name):
                self._point(name, name, version)
        return version

    def _refuse_alias_of_another(self, name: str) -> None:
        row = self._alias_row(name)
        if row is not None and row["name"] != name:
            raise ConfigError(
                f'"{name}" is an alias of {row["name"]}@{row["version"]}. Add to "{row["name"]}", '
                "or choose another name."
            )

    def set_alias(self, alias: str, model: str) -> Alias:
        """Point `alias` to what `model` means now; a canary of the alias ends.

        Raises:
            UnknownAdapterError: `model` means nothing here.
            ConfigError: the name cannot be used, or is another adapter's own.
        """
        check_name(alias)
        with self._db.write():
            target = self._canonical(model)
            if target.name != alias and self.versions(alias):
                raise ConfigError(
                    f'"{alias}" is the name of an adapter with versions of its own, so it cannot point to '
                    f"{target.model}. Choose another alias."
                )
            self._point(alias, target.name, target.version)
        return self.alias(alias)

    def set_canary(self, alias: str, version: int, share: float) -> Alias:
        """Give `version` a share of the alias's requests, chosen by who asks; share 0 ends it.

        Raises:
            UnknownAdapterError: no such alias or version.
            ConfigError: the share is not between 0 and 1.
        """
        if not (math.isfinite(share) and 0 <= share <= 1):
            raise ConfigError(f"share={share}: use a number from 0 (none) to 1 (all)")
        with self._db.write() as db:
            found = self.alias(alias)
            target = self._get(found.name, version)
            db.read(
                "UPDATE aliases SET canary_version = ?, canary_share = ? WHERE alias = ?",
                (version if share else None, share, alias),
            )
            db.log("canary", alias, version, target.digest, f"share {share:g}")
        return self.alias(alias)

    def rollback(self, alias: str) -> Alias:
        """Point the alias to where it pointed before; again goes further back. A canary ends.

        Raises:
            UnknownAdapterError: no such alias.
            ConfigError: there is nothing to go back to.
        """
        with self._db.write() as db:
            self.alias(alias)
            rows = db.read(
                "SELECT p.* FROM past_targets p JOIN versions v USING (name, version) "
                "WHERE alias = ? AND NOT is_removed ORDER BY number DESC LIMIT 1",
                (alias,),
            )
            if not rows:
                raise ConfigError(f'"{alias}" never pointed to another version that is still there.')
            past = rows[0]
            db.read("DELETE FROM past_targets WHERE alias = ? AND number >= ?", (alias, past["number"]))
            self._move(alias, past["name"], past["version"], "rollback")
        return self.alias(alias)

    def remove(self, model: str, *, drop_aliases: bool = False) -> list[Version]:
        """Remove `name@version`, or every version of `name`. Its files go when the last lease ends.

        Args:
            drop_aliases: also remove aliases that point there.

        Raises:
            UnknownAdapterError: there is nothing of that name.
            ConfigError: an alias still points to it.
        """
        name, version = split_model(model)
        with self._db.write() as db:
            gone = [v for v in self.versions(name) if version in (None, v.version)]
            if not gone:
                raise self._unknown(model)
            is_whole = len(gone) == len(self.versions(name))
            pointing = self._pointing_at(name, {v.version for v in gone})
            blocking = [a for a in pointing if not (is_whole and a == name)]
            if blocking and not drop_aliases:
                raise ConfigError(
                    f"{model} is still what {', '.join(blocking)} points to. Point it elsewhere first "
                    "(store alias, store rollback), or remove it too (--drop-aliases)."
                )
            for alias in pointing:
                db.read("DELETE FROM aliases WHERE alias = ?", (alias,))
                db.read("DELETE FROM past_targets WHERE alias = ?", (alias,))
                db.log("drop-alias", alias)
            for v in gone:
                db.read(
                    "UPDATE versions SET is_removed = 1 WHERE name = ? AND version = ?", (name, v.version)
                )
                db.log("remove", name, v.version, v.digest)
        self.collect()
        return gone

    def collect(self) -> list[str]:
        """Delete the files of adapters that no version and no lease needs; return their digests."""
        freed = []
        with explained(self.root):
            for digest in self._objects.digests():
                if not self._is_wanted(digest) and self._discard(digest):
                    freed.append(digest)
            self._objects.sweep()
        if freed:
            with self._db.write() as db:
                for digest in freed:
                    db.log("collect", "", None, digest)
        return freed

    def _discard(self, digest: str) -> bool:
        """Nothing is written to the database here, so that a full disk can be freed."""
        with self._db.write():
            return not self._is_wanted(digest) and self._objects.discard(digest)

    def _after_release(self, digest: str) -> None:
        if not self._is_wanted(digest):
            self.collect()

    def _is_intact(self, digest: str) -> bool:
        try:
            read_checked(self.path(digest), digest)
        except AdapterFileError:
            return False
        return True

    def _point(self, alias: str, name: str, version: int) -> None:
        """Move an alias and remember where it was; nothing happens if it is there already."""
        old = self._alias_row(alias)
        if old is not None and (old["name"], old["version"], old["canary_version"]) == (name, version, None):
            return
        if old is not None and (old["name"], old["version"]) != (name, version):
            self._db.read(
                "INSERT INTO past_targets (alias, name, version) VALUES (?,?,?)",
                (alias, old["name"], old["version"]),
            )
        self._move(alias, name, version, "alias")

    def _move(self, alias: str, name: str, version: int, action: str) -> None:
        self._db.read(
            "INSERT INTO aliases (alias, name, version) VALUES (?,?,?) ON CONFLICT (alias) DO UPDATE SET "
            "name = excluded.name, version = excluded.version, canary_version = NULL, canary_share = 0",
            (alias, name, version),
        )
        self._db.log(action, alias, version, self._get(name, version).digest, f"{name}@{version}")


def _me() -> str:
    try:
        return f"{getpass.getuser()} (process {os.getpid()})"
    except (KeyError, OSError):
        return f"process {os.getpid()}"
