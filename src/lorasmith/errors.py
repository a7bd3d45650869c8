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
     ├ AccessError (PermissionError)     a key is missing, wrong, or not for this
     ├ OverloadedError (RuntimeError)    too much is asked at once; carries when to ask again
     ├ DeadlineError (TimeoutError)      an answer did not come in the time that was given
     ├ UnavailableError (RuntimeError)   the server is starting, draining or broken
     ├ EngineError (RuntimeError)        the engine could not go on with a request
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


class AccessError(LoraSmithError, PermissionError): ...


class OverloadedError(LoraSmithError, RuntimeError):
    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(LoraSmithError, TimeoutError): ...


class UnavailableError(LoraSmithError, RuntimeError): ...


class EngineError(LoraSmithError, RuntimeError): ...


class OutputError(LoraSmithError, OSError): ...


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return ` Did you mean "…"?`, or an empty string where nothing known is close."""
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""
