"""What LoRA learns: rank, matrices, few data, prefixes, subspaces, intrinsic dimension, each trained on the base.

Runs that several claims need are trained once (`runs`), so the first of them takes longest.
"""

from __future__ import annotations

from lorasmith.claims.claim import Claim
from lorasmith.claims.learning import (
    amplifying,
    approach,
    dimension,
    low_data,
    matrices,
    prefix,
    rank,
    subspaces,
)

LEARNING: tuple[Claim, ...] = (
    rank.CLAIM,
    matrices.CLAIM,
    approach.CLAIM,
    subspaces.CLAIM,
    amplifying.CLAIM,
    prefix.CLAIM,
    low_data.CLAIM,
    dimension.CLAIM,
)

__all__ = ["LEARNING"]
