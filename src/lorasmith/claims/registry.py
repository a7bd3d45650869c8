"""Every claim, in the report's order."""

from __future__ import annotations

from collections.abc import Sequence

from lorasmith.claims.claim import Claim
from lorasmith.claims.learning import LEARNING
from lorasmith.claims.mechanics import MECHANICS
from lorasmith.claims.quality import QUALITY
from lorasmith.errors import ConfigError, did_you_mean

CLAIMS: tuple[Claim, ...] = (*MECHANICS, *LEARNING, *QUALITY)


def choose(only: Sequence[str] = (), claims: Sequence[Claim] = CLAIMS) -> tuple[Claim, ...]:
    """The claims of these ids, in the report's order; all of them if none is named.

    Raises:
        ConfigError: naming every id that no claim has.
    """
    ids = [claim.id for claim in claims]
    unknown = [name for name in only if name not in ids]
    if unknown:
        lines = [f'--only: no claim is called "{name}".{did_you_mean(name, ids)}' for name in unknown]
        raise ConfigError("\n  ".join(lines) + f"\n  claims: {', '.join(ids)}")
    return tuple(claim for claim in claims if not only or claim.id in only)
