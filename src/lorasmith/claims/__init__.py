"""The paper's claims, measured again on a model of your own: each a design, an expectation, a verdict.

`mechanics/` holds those that are exact or a matter of bytes and seconds; `learning/` and `quality/` those
that train. `registry.py` lists them in the report's order; `runner.py` measures them.

May import: sweep, train, engine, baselines, inject, formats, bases, data, analysis, planning, scoring, lora, drawing, errors.
"""

from __future__ import annotations

from lorasmith.claims.claim import Claim, Holds, Measured, Setting
from lorasmith.claims.quality import Rescored, rescore
from lorasmith.claims.registry import CLAIMS, choose
from lorasmith.claims.runner import run_claims

__all__ = ["CLAIMS", "Claim", "Holds", "Measured", "Rescored", "Setting", "choose", "rescore", "run_claims"]
