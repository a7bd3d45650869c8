"""`InjectReport`: what was adapted, what was not, and how many parameters train."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lorasmith.inject.targets import layer_number


@dataclass(frozen=True)
class InjectReport:
    """Result of `inject`.

    Attributes:
        ranks: module path → rank, for every adapted module.
        trainable_params: parameters that an optimizer would update.
        total_params: all parameters of the model, the adapter's included.
        not_matched: paths of the linear layers that carry no factors.
        transposed: paths of adapted modules whose weight is stored (in_features, out_features).
    """

    ranks: Mapping[str, int]
    trainable_params: int
    total_params: int
    not_matched: tuple[str, ...]
    transposed: tuple[str, ...] = ()

    @property
    def coverage(self) -> dict[str, dict[int | None, int]]:
        """Target name → layer number → rank."""
        table: dict[str, dict[int | None, int]] = defaultdict(dict)
        for path, rank in self.ranks.items():
            table[path.rpartition(".")[2]][layer_number(path)] = rank
        return dict(table)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "adapted_modules": len(self.ranks),
            "trainable_params": self.trainable_params,
            "total_params": self.total_params,
            "coverage": {t: {str(n): r for n, r in row.items()} for t, row in self.coverage.items()},
            "not_matched": list(self.not_matched),
        }

    def __str__(self) -> str:
        share = self.trainable_params / max(self.total_params, 1)
        rows = [
            f"  {target:<14} {len(row):>4} modules  layers {_spans(row)}  rank {_spans(set(row.values()))}"
            for target, row in self.coverage.items()
        ]
        skipped = ", ".join(self.not_matched[:4]) + (", …" if len(self.not_matched) > 4 else "")
        return "\n".join(
            [
                f"{len(self.ranks)} modules adapted, {self.trainable_params:,} of {self.total_params:,} "
                f"parameters train ({share:.2%})",
                *rows,
                f"  linear layers left alone: {len(self.not_matched)}" + (f" ({skipped})" if skipped else ""),
            ]
        )


def _spans(numbers: Iterable[int | None]) -> str:
    """`0-3, 7` for {0, 1, 2, 3, 7}."""
    known = sorted(n for n in numbers if n is not None)
    spans: list[list[int]] = []
    for n in known:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) or "–"
