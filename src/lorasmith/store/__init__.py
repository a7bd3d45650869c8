"""A durable registry of adapters: content-addressed directories, versions, aliases, canaries, an audit log.

Layout of a store directory:

    registry.sqlite          names, versions, aliases and the audit log (SQLite, write-ahead log)
    objects/<digest>/        one adapter each, never changed after it appears
    staging/                 copies on their way in, and removed objects on their way out

May import: formats, bases, quantised, lora, errors
"""

from lorasmith.store.facts import base_facts
from lorasmith.store.names import split_model
from lorasmith.store.objects import Lease, Staged
from lorasmith.store.records import Alias, AuditEntry, BaseFacts, Canary, Version
from lorasmith.store.store import Store

__all__ = [
    "Alias",
    "AuditEntry",
    "BaseFacts",
    "Canary",
    "Lease",
    "Staged",
    "Store",
    "Version",
    "base_facts",
    "split_model",
]
