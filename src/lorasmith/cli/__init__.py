"""Commands: parse, call, print. Heavy imports happen inside a command, so that `--help` answers at once.

<<<<<<< HEAD
May import: server, sweep, verify, train, engine, baselines, store, inject, formats, bases, data, analysis,
=======
May import: server, verify, train, engine, baselines, store, inject, formats, bases, data, analysis,
>>>>>>> h-verify
planning, scoring, lora, errors.
"""

from lorasmith.cli.app import main

__all__ = ["main"]
