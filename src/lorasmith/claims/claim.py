"""`Claim`: a sentence of the paper and how it is measured here; `Measured`: what came of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from lorasmith.bases import Base, load_base
from lorasmith.train import write_atomically


class Holds(StrEnum):
    """Verdict on a claim."""

    YES = "holds"
    NO = "does not hold"
    NOT_AT_THIS_SCALE = "not at this scale"


@dataclass(frozen=True)
class Setting:
    """What the claims are measured on, and how much is spent.

    Attributes:
        base: a name that `load_base` takes.
        quick: the small designs, together within ten minutes on two cores; else the full ones.
        out: folder of `claims.json`, `report.html`, the plots and `cache/`.
        say: receives a line when something begins that takes time.
    """

    base: str
    quick: bool
    out: Path
    say: Callable[[str], None] = print

    def load(self, dtype: str = "auto") -> Base:
        """Return a fresh copy of the base: a claim may change it as it likes."""
        return load_base(self.base, dtype=dtype)

    def cached(self, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """`compute()`, plain JSON values, or what it returned when it was last asked with this key and base.

        Args:
            key: everything that the result depends on (plain values), but for the base.
        """
        text = json.dumps({"base": self.base, **key}, sort_keys=True)
        path = self.out / "cache" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        if path.exists():
            return json.loads(path.read_text())["result"]
        result = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"key": json.loads(text), "result": result}, indent=1))
        return json.loads(json.dumps(result))


@dataclass(frozen=True)
class Measured:
    """Result of a claim.

    Attributes:
        holds: the verdict.
        said: one or two sentences: what was found, with its uncertainty and what it does not show.
        figures: name → number or text, for `claims.json`.
        rows: a table for the report, one mapping per row with the same keys.
    """

    holds: Holds
    said: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        id: short, of letters and dashes; `claims --only ID` names it.
        title: what the report calls it.
        claim: the claim itself, in our words.
        source: where it is made: paper, section or table.
        design: how it is measured here, sizes and seeds included.
        expected: what the source says, in its numbers.
        measure: measures it.
        draw: draws what was measured into a PNG at the path (matplotlib); None shows the table alone.
    """

    id: str
    title: str
    claim: str
    source: str
    design: str
    expected: str
    measure: Callable[[Setting], Measured]
    draw: Callable[[Measured, Path], None] | None = None
