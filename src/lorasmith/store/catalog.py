"""Reading the registry: what names, versions, aliases and digests mean."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence

from lorasmith.errors import UnknownAdapterError, did_you_mean
from lorasmith.store.database import Database
from lorasmith.store.names import is_digest, split_model
from lorasmith.store.records import Alias, AuditEntry, Version

_LIVE = "SELECT * FROM versions WHERE NOT is_removed"
_ALIASES = "SELECT a.*, v.digest FROM aliases a JOIN versions v USING (name, version)"


class Catalog:
    """The reading half of a `Store`."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def versions(self, name: str | None = None) -> list[Version]:
        """Every version, or those of one name, oldest first."""
        if name is None:
            return self._versions("ORDER BY name, version")
        return self._versions("AND name = ? ORDER BY version", name)

    def by_digest(self, digest: str) -> list[Version]:
        """Every version with this content, the newest first; none if there is none."""
        return self._versions("AND digest = ? ORDER BY rowid DESC", digest)

    def digests(self) -> set[str]:
        """Of all versions."""
        return {row["digest"] for row in self._db.read(_LIVE)}

    def aliases(self) -> list[Alias]:
        """Every alias, by name."""
        return [Alias.of(row) for row in self._db.read(f"{_ALIASES} ORDER BY alias")]

    def alias(self, alias: str) -> Alias:
        """One alias.

        Raises:
            UnknownAdapterError: nobody made it.
        """
        found = self.find_alias(alias)
        if found is None:
            raise self._unknown(alias)
        return found

    def find_alias(self, alias: str) -> Alias | None:
        """One alias; None if nobody made it."""
        rows = self._db.read(f"{_ALIASES} WHERE alias = ?", (alias,))
        return Alias.of(rows[0]) if rows else None

    def resolve(self, model: str, *, key: str = "") -> Version:
        """The version that an alias, `alias@version` or a digest means.

        Args:
            key: who asks. While the alias has a canary, the same key always gets the same version.

        Raises:
            UnknownAdapterError: there is none.
            ConfigError: what follows the `@` is no version number.
        """
        found = self.find(model, key=key)
        if found is not None:
            return found
        name, version = split_model(model)
        alias = None if version is None else self.find_alias(name)
        raise self._unknown(model) if alias is None else self._no_version(alias.name, version)

    def find(self, model: str, *, key: str = "") -> Version | None:
        """As `resolve`, but None if there is none; for many calls with names that others choose.

        Raises:
            ConfigError: what follows the `@` is no version number.
        """
        if is_digest(model):
            return next(iter(self.by_digest(model)), None)
        name, version = split_model(model)
        alias = self.find_alias(name)
        if alias is None:
            return None
        if version is None:
            version = alias.version
            if alias.canary is not None and _share_of(alias.alias, key) < alias.canary.share:
                version = alias.canary.version
        return self._find(alias.name, version, (name,))

    def audit(self, limit: int = 100) -> list[AuditEntry]:
        """The last changes, newest first."""
        rows = self._db.read("SELECT * FROM audit ORDER BY number DESC LIMIT ?", (limit,))
        return [AuditEntry(**dict(row)) for row in rows]

    def _versions(self, where: str, *parameters: object) -> list[Version]:
        rows = self._db.read(f"{_LIVE} {where}", parameters)
        names = {row["name"] for row in rows}
        pointing: dict[tuple[str, int], list[str]] = {}
        some = [names.pop()] if len(names) == 1 else []
        for row in self._db.read(
            f"SELECT * FROM aliases {'WHERE name = ?' if some else ''} ORDER BY alias", some
        ):
            pointing.setdefault((row["name"], row["version"]), []).append(row["alias"])
        return [Version.of(row, pointing.get((row["name"], row["version"]), ())) for row in rows]

    def _find(self, name: str, version: int, asked: Sequence[str] = ()) -> Version | None:
        rows = self._db.read(f"{_LIVE} AND name = ? AND version = ?", (name, version))
        return Version.of(rows[0], asked) if rows else None

    def _get(self, name: str, version: int) -> Version:
        found = self._find(name, version)
        if found is None:
            raise self._no_version(name, version)
        return found

    def _is_wanted(self, digest: str) -> bool:
        return bool(self._db.read(f"{_LIVE} AND digest = ? LIMIT 1", (digest,)))

    def _live_version_of(self, name: str, digest: str) -> int | None:
        rows = self._db.read(
            f"{_LIVE} AND name = ? AND digest = ? ORDER BY version DESC LIMIT 1", (name, digest)
        )
        return int(rows[0]["version"]) if rows else None

    def _next_version(self, name: str) -> int:
        rows = self._db.read("SELECT max(version) AS last FROM versions WHERE name = ?", (name,))
        return int(rows[0]["last"] or 0) + 1

    def _alias_row(self, alias: str) -> sqlite3.Row | None:
        return next(iter(self._db.read("SELECT * FROM aliases WHERE alias = ?", (alias,))), None)

    def _pointing_at(self, name: str, versions: set[int]) -> list[str]:
        rows = self._db.read("SELECT * FROM aliases WHERE name = ? ORDER BY alias", (name,))
        return [r["alias"] for r in rows if {r["version"], r["canary_version"]} & versions]

    def _canonical(self, model: str) -> Version:
        """As `resolve`, without its canary."""
        if is_digest(model) or "@" in model:
            return self.resolve(model)
        alias = self.alias(model)
        return self._get(alias.name, alias.version)

    def _no_version(self, name: str, version: int | None) -> UnknownAdapterError:
        there = ", ".join(str(v.version) for v in self.versions(name)) or "none"
        return UnknownAdapterError(f'"{name}" has no version {version} (there are: {there}).')

    def _unknown(self, model: str) -> UnknownAdapterError:
        known = [alias.alias for alias in self.aliases()]
        return UnknownAdapterError(
            f'no adapter "{model[:160]}" is registered.{did_you_mean(model[:160], known)}'
        )


def _share_of(alias: str, key: str) -> float:
    """A number in [0, 1) that depends on nothing but these two texts."""
    text = f"{len(alias)} {alias} {key}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2.0**56
