"""A config that says the truth about factors which were computed rather than trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from re import escape

from lorasmith.lora import Factors, LoRAConfig


def config_for(config: LoRAConfig, factors: Mapping[str, Factors]) -> LoRAConfig:
    """`config` with rank, alpha and patterns such that every module's scaling is exactly 1.

    The commonest rank is the default; the others are named by whole path. A key also matches longer
    paths that end in it and the first match wins, so longer keys come first, and where a short path
    would still capture another module, every module is named.
    """
    ranks = {path: f.rank for path, f in factors.items()}
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else config.rank
    odd = _with_patterns(config, common, {p: r for p, r in ranks.items() if r != common})
    if all(odd.rank_of(path) == rank for path, rank in ranks.items()):
        return odd
    return _with_patterns(config, common, ranks)


def _with_patterns(config: LoRAConfig, rank: int, ranks: Mapping[str, int]) -> LoRAConfig:
    patterns = {escape(path): ranks[path] for path in sorted(ranks, key=lambda p: (-len(p), p))}
    alphas = {key: float(r) for key, r in patterns.items()}
    return replace(
        config,
        rank=rank,
        alpha=float(rank),
        rank_pattern=patterns,
        alpha_pattern=alphas,
        rslora=False,
    )
