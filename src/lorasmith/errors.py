"""Every exception that lorasmith raises on purpose, in one tree.

    LoraSmithError
     ├ ConfigError (ValueError)          a setting is out of range, unknown or contradictory
     ├ TargetError (ValueError)          a target matches no module, or one that cannot carry LoRA
     ├ AdapterFileError (ValueError)     an adapter on disk is missing, damaged, hostile or incomplete
     ├ BaseNotFoundError (LookupError)   a base name leads to no usable model
     ├ BaseMismatchError (ValueError)    the adapter was made for another base
     ├ MergeStateError (RuntimeError)    merge, unmerge, inject or eject in the wrong state
     ├ MergeLossError (ValueError)       too little of the update would survive the rounding
     ├ DataError (ValueError)            records that cannot be read, or that train on nothing
     ├ TrainingError (RuntimeError)      a run cannot go on: loss not finite, checkpoint unusable
     ├ BudgetError (ValueError)          the work does not fit the memory, context or time given
     ├ UnknownAdapterError (KeyError)    a name or digest that nobody registered
     └ OutputError (OSError)             a result cannot be written where it was asked for

Each class also inherits the standard type that it refines, so `except ValueError` keeps working.
A message says what was asked, what was found and what to do.
The command line prints it and exits with 2; the server maps the class to an HTTP status.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoraSmithError(Exception):
    """Root of the tree."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ConfigError(LoraSmithError, ValueError): ...


class TargetError(LoraSmithError, ValueError): ...


class AdapterFileError(LoraSmithError, ValueError): ...


class BaseNotFoundError(LoraSmithError, LookupError): ...


class BaseMismatchError(LoraSmithError, ValueError): ...


class MergeStateError(LoraSmithError, RuntimeError): ...


class MergeLossError(LoraSmithError, ValueError): ...


class DataError(LoraSmithError, ValueError): ...


class TrainingError(LoraSmithError, RuntimeError): ...


class BudgetError(LoraSmithError, ValueError): ...


class UnknownAdapterError(LoraSmithError, KeyError): ...


class OutputError(LoraSmithError, OSError): ...


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return ` Did you mean "…"?`, or an empty string where nothing known is close."""
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""
