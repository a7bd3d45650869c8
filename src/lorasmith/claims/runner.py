"""Measure claims one after the other, and keep `claims.json` true after each."""

from __future__ import annotations

import json
import os
import platform
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from lorasmith.claims.claim import Claim, Measured, Setting
from lorasmith.train import commit, make_writable, versions, write_atomically

FILE = "claims.json"


def run_claims(
    claims: Sequence[Claim],
    setting: Setting,
    *,
    order: Sequence[str],
    on_done: Callable[[dict[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Measure `claims`; one that fails is entered with its error, and the others go on.

    Entries that an earlier call left in `setting.out` for other claims, on the same base and of the same size,
    are kept, so that pieces make a whole. An interruption loses only the claim that was being measured, and of that
    only what was not yet in `setting.cached`.

    Args:
        order: ids of all claims, in the report's order.
        on_done: called with the document after each claim, when it has been written.

    Returns:
        What `claims.json` holds.

    Raises:
        OutputError: `setting.out` cannot be written.
    """
    make_writable(setting.out)
    kept = {e["id"]: e for e in _earlier(setting) if e["id"] in order}
    for number, claim in enumerate(claims, 1):
        setting.say(f"[{number}/{len(claims)}] {claim.id}: {claim.title}")
        kept[claim.id] = entry = _measure(claim, setting)
        setting.say(f"    {entry['holds'] or 'error'}: {entry['measured'] or entry['error']}")
        document = _document(setting, [kept[i] for i in order if i in kept])
        write_atomically(setting.out / FILE, json.dumps(document, indent=1, default=str) + "\n")
        on_done(document)
    return document


def _measure(claim: Claim, setting: Setting) -> dict[str, Any]:
    started, error, trace, found, plot = time.monotonic(), None, None, None, None
    try:
        found = claim.measure(setting)
        plot = _draw(claim, found, setting)
    except Exception as caught:
        error, trace = f"{type(caught).__name__}: {caught}", traceback.format_exc()
    texts = {name: getattr(claim, name) for name in ("id", "title", "claim", "source", "design", "expected")}
    return {
        **texts,
        "measured": found.said if found else None,
        "holds": str(found.holds) if found and error is None else None,
        "figures": dict(found.figures) if found else {},
        "rows": [dict(row) for row in found.rows] if found else [],
        "plot": plot,
        "error": error,
        "traceback": trace,
        "measured_s": round(time.monotonic() - started, 1),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _draw(claim: Claim, found: Measured, setting: Setting) -> str | None:
    """Name of the plot's file within `out`."""
    if claim.draw is None:
        return None
    name = f"plots/{claim.id}.png"
    claim.draw(found, setting.out / name)
    return name


def _document(setting: Setting, entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "claims": entries,
        "base": setting.base,
        "quick": setting.quick,
        "device": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
        "versions": versions(),
        "commit": commit(),
    }


def _earlier(setting: Setting) -> list[dict[str, Any]]:
    try:
        document: Mapping[str, Any] = json.loads((setting.out / FILE).read_text(encoding="utf-8"))
        same = (document["base"], document["quick"]) == (setting.base, setting.quick)
        entries = list(document["claims"])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError):
        setting.say(f"{setting.out / FILE} cannot be read and is written anew")
        return []
    if not same:
        setting.say(f"{setting.out / FILE} was of another base or size and is written anew")
    return entries if same else []
