"""From a `model` text to a digest, by the store alone: no weights, no engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorasmith.errors import ConfigError, UnknownAdapterError
from lorasmith.server.keys import Tenant
from lorasmith.store import Store, Version


@dataclass(frozen=True)
class Resolved:
    """What answers a request. `digest` is None for the plain base.

    Attributes:
        asked: the name by which the tenant asked, without a version.
    """

    asked: str
    name: str
    version: int | None
    digest: str | None
    base: dict[str, Any] | None = None

    @property
    def model(self) -> str:
        """`name@version`, or the base's name."""
        return self.name if self.version is None else f"{self.name}@{self.version}"


class Names:
    """What tenants may call a model. Thread-safe."""

    def __init__(self, store: Store, *, base_id: str) -> None:
        self.store = store
        self.base_id = base_id
        self._withdrawn: set[str] = set()

    def resolve(self, model: str, tenant: Tenant, *, key: str = "") -> Resolved:
        """What `model` means to this tenant. What it may not use does not exist for it.

        Raises:
            UnknownAdapterError: nothing, so never the base.
        """
        if model == self.base_id:
            if self.store.find_alias(model) is not None:
                raise ConfigError(f'"{model}" is the base and also an alias; rename the alias')
            if tenant.may_use(model):
                return Resolved(model, model, None, None)
        else:
            version = self._find(model, tenant, key)
            if version is not None and version.digest not in self._withdrawn:
                asked = model.partition("@")[0]
                return Resolved(asked, version.name, version.version, version.digest, plain(version.base))
        # The store's own message would suggest other tenants' names.
        raise UnknownAdapterError(f'the model "{model[:160]}" does not exist, or this key may not use it')

    def models(self, tenant: Tenant) -> list[dict[str, Any]]:
        """Entries of /v1/models: the base, and every alias that this tenant may use."""
        entries = [_entry(self.base_id, None)] if tenant.may_use(self.base_id) else []
        aliases = self.store.aliases()  # first: whatever they point to is among the versions, or gone
        versions = {(v.name, v.version): v for v in self.store.versions()}
        for alias in aliases:
            version = versions.get((alias.name, alias.version))
            if version is not None and tenant.may_use(alias.alias) and alias.digest not in self._withdrawn:
                canary = alias.to_dict()["canary"]
                about = {
                    "digest": alias.digest,
                    "version": alias.version,
                    "name": alias.name,
                    "canary": canary,
                }
                entries.append(_entry(alias.alias, self.base_id, int(version.added_at), about))
        return entries

    def withdraw(self, digest: str) -> None:
        """From now on it does not exist for anybody."""
        self._withdrawn.add(digest)

    def restore(self, digest: str) -> None:
        """Undo that."""
        self._withdrawn.discard(digest)

    def _find(self, model: str, tenant: Tenant, key: str) -> Version | None:
        try:
            version = self.store.find(model, key=key)
        except ConfigError:
            return None
        if version is None or version.digest != model:
            return version if tenant.may_use(model.partition("@")[0]) else None
        same = self.store.by_digest(model)
        return next((v for v in same if any(map(tenant.may_use, (v.name, *v.aliases)))), None)


def plain(base: Any) -> dict[str, Any] | None:
    """As a dictionary of its own."""
    return None if base is None else dict(base)


def _entry(
    name: str, parent: str | None, created: int = 0, about: dict[str, Any] | None = None
) -> dict[str, Any]:
    entry = {"id": name, "object": "model", "created": created, "owned_by": "lorasmith", "parent": parent}
    return entry | {"lorasmith": about or {"digest": None, "version": None, "name": name, "canary": None}}
