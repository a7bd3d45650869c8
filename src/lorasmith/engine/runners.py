"""Which runner a model gets: the fastest that computes it, and why not a faster one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorasmith.engine.generic import GenericRunner
from lorasmith.engine.llama import LlamaRunner, why_not_fast
from lorasmith.engine.runner import Runner
from lorasmith.engine.solo import SoloRunner
from lorasmith.errors import ConfigError

KINDS = ("auto", "fast", "generic", "solo")


@dataclass(frozen=True)
class Made:
    """A runner; `why_not_fast` is None for the fast one."""

    runner: Runner
    why_not_fast: str | None


def make_runner(model: Any, kind: str, *, max_rows: int, exact: bool, pack: bool) -> Made:
    """The runner of this kind, or with `"auto"` the first that works: fast, generic, solo.

    Raises:
        ConfigError: the kind is unknown, or it does not compute this model.
    """
    if kind not in KINDS:
        raise ConfigError(f'Engine: runner="{kind}" is unknown: use one of {", ".join(KINDS)}')
    reason = why_not_fast(model)
    if kind == "fast" and reason:
        raise ConfigError(f'Engine: runner="fast" cannot run this base: {reason}. Use "generic" or "auto".')
    if kind in ("auto", "fast") and not reason:
        return Made(LlamaRunner(model, max_rows=max_rows, pack=pack, exact=exact), None)
    reason = reason or f'runner="{kind}" was asked for'
    if kind != "solo":
        try:
            return Made(GenericRunner(model, max_rows=max_rows, exact=exact), reason)
        except ConfigError as error:
            if kind == "generic":
                raise
            reason = f"{error}".partition("\n")[0]
    return Made(SoloRunner(model, max_rows=max_rows), reason)
