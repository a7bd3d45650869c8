"""Which replica an adapter belongs to: rendezvous hashing.

Every replica gets a score for the adapter; the highest is its home, the next one takes what the home cannot.
When a replica comes or goes, only the adapters whose home it is move (Thaler and Ravishankar, 1998).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping


def ranked(digest: str | None, replicas: Iterable[str]) -> list[str]:
    """The replicas, first choice first. None is the plain base."""
    return sorted(replicas, key=lambda replica: (_score(digest or "", replica), replica), reverse=True)


def pick(
    digest: str | None, rows: Mapping[str, int], *, wanted: int, room: int, avoid: Collection[str]
) -> str:
    """The first choice that has room for `wanted` rows more; where none has, the one with fewest.

    Args:
        rows: replica → the rows that it has; at least one replica. avoid: who is picked only if there is no other.
    """
    order = ranked(digest, [name for name in rows if name not in avoid] or rows)
    return next(
        (name for name in order if rows[name] + wanted <= room), min(order, key=lambda name: rows[name])
    )


def _score(digest: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{digest} {replica}".encode(), digest_size=8).digest()
