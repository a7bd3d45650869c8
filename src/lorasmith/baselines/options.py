"""`MethodOptions`: the few settings that each method has, in one flat set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from lorasmith.errors import ConfigError, did_you_mean

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {},
    "houlsby": {"bottleneck": 64},
    "lin": {"bottleneck": 64},
    "prefix": {"virtual_tokens": 5, "prefix_hidden": 512, "init_text": None},
    "prompt": {"virtual_tokens": 20, "init_text": None},
    "bitfit": {"biases": "own"},
    "top-k": {"top_layers": 2},
    "intrinsic": {"dimension": 1000, "projection": "auto", "said": False},
}
"""Method → its options and their defaults."""
CHOICES = {"biases": ("own", "added"), "projection": ("auto", "fastfood", "sparse")}
_COUNTS = ("bottleneck", "virtual_tokens", "prefix_hidden", "top_layers", "dimension")


@dataclass(frozen=True)
class MethodOptions:
    """Settings of one method; None is that method's default.

    Args:
        bottleneck: numbers between the two products of a bottleneck adapter (64).
        virtual_tokens: learned positions before the text (prefix 5, prompt 20); with `init_text`,
            as many as it has tokens.
        prefix_hidden: width of the network that a prefix is trained through and that is dropped
            afterwards (512).
        init_text: start from this text: a prefix from its keys and values, and then trained directly;
            a prompt from its embeddings. Without it, a prefix starts random, a prompt from random
            tokens of the vocabulary.
        biases: of BitFit: `"own"` trains the biases that the base has; `"added"` also gives a zero bias
            to every linear layer that has none, for bases without biases, such as Llama.
        top_layers: last decoder layers that train (2).
        dimension: numbers that train in all, SAID's multipliers among them (1000).
        projection: `"fastfood"` (the paper's), `"sparse"` (one ±1 per weight, fast), or `"auto"`:
            fastfood up to four million weights.
        said: one learned multiplier per decoder layer, and one for the rest.
    """

    bottleneck: int | None = None
    virtual_tokens: int | None = None
    prefix_hidden: int | None = None
    init_text: str | None = None
    biases: str | None = None
    top_layers: int | None = None
    dimension: int | None = None
    projection: str | None = None
    said: bool | None = None

    @property
    def given(self) -> dict[str, Any]:
        """What is not left at its default."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MethodOptions:
        """Build from plain values.

        Raises:
            ConfigError: for a key that is no option.
        """
        known = [f.name for f in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            lines = [f'"{key}" is not an option of any method.{did_you_mean(key, known)}' for key in unknown]
            raise ConfigError("\n  ".join(lines) + f"\n  options: {', '.join(known)}")
        return cls(**values)

    def resolved(self, method: str) -> dict[str, Any]:
        """Every option of `method`, defaults filled in; a text that starts it decides its own length."""
        values = OPTIONS[method] | self.given
        if self.init_text is not None and self.virtual_tokens is None:
            values["virtual_tokens"] = None
        return values


def option_faults(method: str, options: MethodOptions) -> Iterable[str]:
    """What is wrong with these options for this method."""
    for name, value in options.given.items():
        if name not in OPTIONS[method]:
            owners = ", ".join(m for m, own in OPTIONS.items() if name in own)
            yield f"{name}={value!r}: belongs to {owners}, and the method is {method}"
        elif name in _COUNTS and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            yield f"{name}={value!r}: use a whole number of at least 1"
        elif name in CHOICES and value not in CHOICES[name]:
            yield f"{name}={value!r}: use one of {', '.join(CHOICES[name])}"
        elif name == "init_text" and not (isinstance(value, str) and value.strip()):
            yield "init_text is empty: give a text, or leave it out"
    if options.init_text is not None and options.prefix_hidden is not None:
        yield "prefix_hidden goes with a random start; from init_text the prefix is trained directly"
