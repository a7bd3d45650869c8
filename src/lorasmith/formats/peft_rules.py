"""PEFT's two matching rules: which modules a config targets, and which pattern sets rank and alpha.

Patterns come from files of unknown origin, so a regular expression is judged before it runs.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

MAX_PATTERN_LENGTH = 4_000
_MAX_STEPS = 2e8  # of backtracking, worst case, for one pattern on one path: a few seconds
_LITERAL = re.compile(r"\^?(?:[\w-]|\\[.-])+")
_FIRST_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


@dataclass(frozen=True)
class TargetRules:
    """`target_modules`, `exclude_modules`, `layers_to_transform` and `layers_pattern` of PEFT."""

    targets: str | tuple[str, ...]
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()

    def selects(self, path: str) -> bool:
        """Whether PEFT puts LoRA on the module at `path`. `"all-linear"` selects everything."""
        if self.exclude and _matches(self.exclude, path):
            return False
        if isinstance(self.targets, str):
            return self.targets == "all-linear" or re.fullmatch(self.targets, path) is not None
        if not self.layers or path in self.targets:  # a module named in full needs no layer
            return _matches(self.targets, path)
        return _matches(self.targets, path) and self._layer_of(path) in self.layers

    def regexes(self) -> list[str]:
        """Everything in here that is a regular expression."""
        wholes = [v for v in (self.targets, self.exclude) if isinstance(v, str) and v != "all-linear"]
        return wholes + [_layer_regex(p) for p in self.layers_pattern]

    def _layer_of(self, path: str) -> int | None:
        patterns = [re.compile(_layer_regex(p)) for p in self.layers_pattern] or [_FIRST_LAYER]
        match = next(filter(None, (pattern.match(path) for pattern in patterns)), None)
        return int(match["idx"]) if match else None


def _layer_regex(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def _matches(targets: str | tuple[str, ...], path: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(suffix in targets for suffix in suffixes(path))


def suffixes(path: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`."""
    while path:
        yield path
        path = path.partition(".")[2]


class PatternTable:
    r"""First match under `re.match(rf"(.*\.)?({key})$", path)`, as `rank_pattern` and `alpha_pattern` work.

    Keys without regular-expression characters, the usual ones, are looked up instead of tried in
    turn: hundreds of keys times hundreds of modules would take seconds.
    """

    def __init__(self, patterns: Mapping[str, float]) -> None:
        self._exact = dict(patterns)
        self._literals: dict[str, tuple[int, float]] = {}
        self._regexes: list[tuple[int, re.Pattern[str], float]] = []
        for order, (key, value) in enumerate(patterns.items()):
            if _LITERAL.fullmatch(key):
                self._literals.setdefault(re.sub(r"\\(.)", r"\1", key), (order, value))
            else:
                self._regexes.append((order, re.compile(pattern_regex(key)), value))

    def get(self, path: str, default: float) -> float:
        """Value of the first key that matches `path`."""
        keys = [f"^{path}", *suffixes(path)]
        best = min((self._literals[k] for k in keys if k in self._literals), default=(math.inf, default))
        for order, regex, value in self._regexes:
            if order > best[0]:
                break
            if regex.match(path):
                return value
        return best[1] if best[0] < math.inf else self._exact.get(path, default)


def pattern_regex(key: str) -> str:
    """Return the expression that PEFT makes of a pattern key."""
    return rf"(.*\.)?({key})$"


def regex_fault(pattern: str) -> str | None:
    """Why `pattern` is refused: it does not compile, or could backtrack exponentially."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        return f"it is {len(pattern)} characters long; at most {MAX_PATTERN_LENGTH} are allowed"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError, Warning) as error:
        return str(error) or type(error).__name__
    return "a repetition inside a repetition can take for ever" if _scan(pattern)[0] else None


def steps_fault(pattern: str, path_length: int) -> str | None:
    """Why `pattern` is refused on paths of this length: its repetitions multiply."""
    repeats = _scan(pattern)[1]
    steps = math.comb(path_length + repeats, repeats)
    return f"{repeats} open repetitions can take too long" if steps > _MAX_STEPS else None


def _scan(pattern: str) -> tuple[bool, int]:
    """(a repeated group holds a repetition or an alternative, number of open repetitions)."""
    text = re.sub(r"\\.", "x", pattern, flags=re.DOTALL)
    text = re.sub(r"\[\^?\]?[^\]]*\]", "x", text)
    nested, repeats, varies = False, 0, [False]
    for token in re.findall(r"\(\?[^:)]?|\)?(?:[*+]|\{\d*,\d*\})|[()|]", text):
        is_open = token[-1] in "*+}"
        repeats += is_open
        if token[0] == "(":
            varies.append(False)
        elif token[0] == ")":
            inner = varies.pop() if len(varies) > 1 else False
            nested |= inner and is_open
            varies[-1] |= inner or is_open
        else:
            varies[-1] = True
    return nested, repeats
