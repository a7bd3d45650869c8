"""CLINC150: accuracy on the intents that are in scope, and recall of the requests that are not."""

from __future__ import annotations

from collections.abc import Sequence

OUT_OF_SCOPE = "out of scope"


def in_scope_accuracy(outputs: Sequence[str], labels: Sequence[str]) -> float | None:
    """Share, in 0…1, of the in-scope requests that got their own label; None without any."""
    return _share(outputs, labels, out_of_scope=False)


def out_of_scope_recall(outputs: Sequence[str], labels: Sequence[str]) -> float | None:
    """Share, in 0…1, of the out-of-scope requests that were called so; None without any."""
    return _share(outputs, labels, out_of_scope=True)


def _share(outputs: Sequence[str], labels: Sequence[str], *, out_of_scope: bool) -> float | None:
    pairs = [(_normal(o), _normal(label)) for o, label in zip(outputs, labels, strict=True)]
    hits = [o == label for o, label in pairs if (label == OUT_OF_SCOPE) == out_of_scope]
    return sum(hits) / len(hits) if hits else None


def _normal(label: str) -> str:
    return " ".join(label.lower().replace("_", " ").split()).rstrip(".")
