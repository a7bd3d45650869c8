"""Commands: parse, call, print. Heavy imports happen inside a command, so that `--help` answers at once.

May import: claims, server, sweep, verify, train, engine, baselines, store, inject, formats, bases, data, analysis,
planning, scoring, quantised, lora, drawing, errors.
"""

from lorasmith.cli.app import main

__all__ = ["main"]
