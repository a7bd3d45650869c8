"""Who may ask: API keys (kept as hashes), tenants and their limits, the admin and the monitor.

    [admin]
    keys = ["sha256:…"]              # `lorasmith key` makes one and prints this line

    [monitor]                        # may read /metrics and /ready
    keys = ["sha256:…"]

    [tenants.acme]
    keys = ["sha256:…"]
    adapters = ["support", "sum-*"]  # names and patterns; the base by its name; "*" is everything
    requests_per_minute = 60
    tokens_per_minute = 100000
    max_waiting = 16
    weight = 2.0                     # of its share when tenants wait for each other

A key has 256 random bits, so one sha256 is enough: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from lorasmith.errors import AccessError, ConfigError, did_you_mean

Role = Literal["tenant", "admin", "monitor"]
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_TENANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Tenant:
    """Whose requests these are, and what they may use."""

    name: str
    adapters: tuple[str, ...] = ("*",)
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_waiting: int | None = None
    weight: float = 1.0

    def may_use(self, name: str) -> bool:
        """Whether an alias, an adapter's name or the base's is allowed."""
        return any(fnmatchcase(name, pattern) for pattern in self.adapters)


ANYBODY = Tenant("")


@dataclass(frozen=True)
class Principal:
    """Who a request comes from."""

    role: Role
    tenant: Tenant = ANYBODY


@dataclass(frozen=True)
class Keys:
    """Hash → principal. Without any key, everybody is one tenant and nobody is admin."""

    by_hash: Mapping[str, Principal] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        """Whether requests need no key: no tenant has one."""
        return not any(p.role == "tenant" for p in self.by_hash.values())

    @property
    def has_admin(self) -> bool:
        """Whether anybody may use the admin API."""
        return any(p.role == "admin" for p in self.by_hash.values())

    def identify(self, authorization: str | None) -> Principal:
        """Who sent this `Authorization` header.

        Raises:
            AccessError: a key is needed, or the one given is not known.
        """
        scheme, _, token = (authorization or "").partition(" ")
        known = self.by_hash.get(hash_key(token.strip())) if scheme.lower() == "bearer" else None
        if known is not None:
            return known
        if self.is_open:  # clients must send some key, so any is fine where none is needed
            return Principal("tenant")
        raise AccessError("no valid API key: send it as `Authorization: Bearer KEY`")


def hash_key(token: str) -> str:
    """What a keys file holds."""
    return "sha256:" + hashlib.sha256(token.encode()).hexdigest()


def new_key() -> str:
    """A new secret key."""
    return "ls-" + secrets.token_urlsafe(32)


def read_keys(path: str | Path) -> Keys:
    """Read a keys file.

    Raises:
        ConfigError: with every fault at once.
    """
    try:
        with Path(path).open("rb") as file:
            values = tomllib.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    faults: list[str] = []
    by_hash: dict[str, Principal] = {}
    for principal, section, hashes in _principals(values, faults):
        for text in hashes:
            if not isinstance(text, str) or not _HASH.fullmatch(text):
                faults.append(f'[{section}] holds a key that is no "sha256:…": keys are never written down')
            elif text in by_hash:
                faults.append(f"[{section}] has a key that somebody else has too")
            else:
                by_hash[text] = principal
    if faults:
        raise ConfigError(f"{path} cannot be used:\n  " + "\n  ".join(faults))
    return Keys(by_hash)


def _principals(values: Mapping[str, Any], faults: list[str]) -> Iterable[tuple[Principal, str, list[Any]]]:
    sections = ("admin", "monitor", "tenants")
    faults += [f"[{s}] is unknown.{did_you_mean(s, sections)}" for s in values if s not in sections]
    for role in ("admin", "monitor"):
        section = values.get(role, {})
        faults += [f"[{role}] {key} is unknown; it has keys" for key in section if key != "keys"]
        yield Principal(role), role, _list(section, "keys", role, faults)
    for name, section in values.get("tenants", {}).items():
        title = f"tenants.{name}"
        if not _TENANT_NAME.fullmatch(name) or not isinstance(section, dict):
            faults.append(f"[{title}] is no table with a plain name")
            continue
        hashes = _list(section, "keys", title, faults)
        if not hashes:
            faults.append(f"[{title}] has no keys")
        yield Principal("tenant", _tenant(name, section, title, faults)), title, hashes


def _tenant(name: str, section: Mapping[str, Any], title: str, faults: list[str]) -> Tenant:
    known = [f.name for f in fields(Tenant) if f.name != "name"]
    values: dict[str, Any] = {}
    for key, value in section.items():
        if key == "keys":
            continue
        if key not in known:
            faults.append(f"[{title}] {key} is unknown.{did_you_mean(key, known)}")
        elif key == "adapters":
            values[key] = tuple(map(str, _list(section, key, title, faults)))
        elif isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            faults.append(f"[{title}] {key} = {value!r}: use a number above 0")
        else:
            values[key] = value
    return Tenant(name, **values)


def _list(section: Mapping[str, Any], key: str, title: str, faults: list[str]) -> list[Any]:
    value = section.get(key, [])
    if not isinstance(value, list):
        faults.append(f"[{title}] {key} must be a list")
        return []
    return value
