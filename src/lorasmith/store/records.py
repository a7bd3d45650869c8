"""What the store tells: versions, aliases, audit entries; and what it is told about a base."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BaseFacts:
    """What an adapter is checked against when it is added.

    Attributes:
        name: of the base, for messages.
        shapes: parameter name → shape.
        match: from an adapter's provenance, whether it was trained on this base; None if it does not say.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    match: Callable[[Mapping[str, Any]], bool | None]


@dataclass(frozen=True)
class Version:
    """One adapter under one name. Its digest never changes, and its number is never given again.

    Attributes:
        base: what the adapter's sidecar says about its base; None for adapters of other tools.
        added_at: seconds since 1970, by the clock of the machine that added it; for people only.
        aliases: those that point to it now.
    """

    name: str
    version: int
    digest: str
    base: Mapping[str, Any] | None
    added_at: float
    aliases: tuple[str, ...] = ()

    @classmethod
    def of(cls, row: sqlite3.Row, aliases: Sequence[str] = ()) -> Version:
        """From a row of the table `versions`."""
        base = None if row["base"] is None else json.loads(row["base"])
        return cls(row["name"], row["version"], row["digest"], base, row["added_at"], tuple(aliases))

    @property
    def model(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = {"name": self.name, "version": self.version, "digest": self.digest}
        base = (self.base or {}).get("name")
        return values | {"aliases": list(self.aliases), "base": base, "added_at": self.added_at}


@dataclass(frozen=True)
class Canary:
    """A version that gets a share of an alias's requests."""

    version: int
    share: float


@dataclass(frozen=True)
class Alias:
    """A name that points to a version."""

    alias: str
    name: str
    version: int
    digest: str
    canary: Canary | None = None

    @classmethod
    def of(cls, row: sqlite3.Row) -> Alias:
        """From a row of the table `aliases`, with the digest."""
        version = row["canary_version"]
        canary = None if version is None else Canary(version, row["canary_share"])
        return cls(row["alias"], row["name"], row["version"], row["digest"], canary)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        canary = None if self.canary is None else {"version": self.canary.version, "share": self.canary.share}
        return {
            "alias": self.alias, "name": self.name, "version": self.version, "digest": self.digest,
            "aliases": [self.alias], "canary": canary,
        }  # fmt: skip


@dataclass(frozen=True)
class AuditEntry:
    """Who changed what. `number` gives the order; `at` is only what the clock said."""

    number: int
    at: float
    actor: str
    action: str
    name: str
    version: int | None
    digest: str | None
    detail: str
