"""What is asked: prompts that no two requests share by accident, and what an answer says about who made it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorasmith.engine import encode_prompt
from lorasmith.errors import DataError

Messages = list[dict[str, str]]
WORDS = [
    "river", "copper", "window", "market", "winter", "teacher", "engine", "garden", "island", "paper",
    "silver", "bridge", "hunter", "music", "orange", "planet", "captain", "forest", "letter", "doctor", "mirror",
    "castle", "butter", "station", "summer", "rabbit", "bottle", "dragon", "pencil", "camera", "ladder",
]  # fmt: skip
LONG_TOKENS = 320  # caches share whole blocks of 16 to 64 tokens; most of a prompt must be in them
ANSWER_TOKENS = 6
OWN_SHARE = 0.75
BASE = "base"
FOREIGN = "foreign"


class Prompts:
    """Chat prompts whose first words are random, so that only prompts made equal share a cached beginning."""

    def __init__(self, tokenizer: Any, *, seed: int | None = None, longest: int = LONG_TOKENS) -> None:
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        self._has_system = self._renders(
            [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
        )
        self._words = 0
        while len(self.tokens(self._make(self._words + 16))) < longest:
            self._words += 16

    def long(self) -> Messages:
        """A prompt that mostly comes from a cache when it is asked again."""
        return self._make(self._words)

    def short(self) -> Messages:
        """A prompt of a few words."""
        return self._make(3)

    def tokens(self, messages: Messages) -> list[int]:
        """Its token ids, as a server of this base renders it."""
        return encode_prompt(messages, self._tokenizer, 1 << 62)

    def _make(self, words: int) -> Messages:
        said = f"{self._random.randrange(10**9)}: write about " + " ".join(
            self._random.choices(WORDS, k=words)
        )
        user = {"role": "user", "content": said}
        system = {"role": "system", "content": f"{self._random.randrange(10**9)} is the session."}
        return [system, user] if self._has_system else [user]

    def _renders(self, messages: Messages) -> bool:
        try:
            return bool(self.tokens(messages))
        except DataError:
            return False


@dataclass(frozen=True)
class Reader:
    """Tells from an answer who made it.

    Attributes:
        markers: adapter → its word. `foreign` is the word of an adapter that runs on the base's cache.
    """

    markers: Mapping[str, str]
    foreign: str

    def who(self, text: str) -> str:
        """An adapter's name, `"base"`, `"foreign"`, or a mixture in words: `"amber and cobalt"`."""
        words = {**self.markers, FOREIGN: self.foreign}
        for name, word in words.items():
            if text.count(word) * len(word) >= OWN_SHARE * len("".join(text.split())) > 0:
                return name
        heard = [name for name, word in words.items() if len(word) > 1 and text.count(word) > 1]
        begun = [n for n, word in words.items() if len(word) > 1 and text.strip().startswith(word)]
        return " and ".join(heard) or "".join(f"{n}, then something else," for n in begun[:1]) or BASE


def shown(text: str, most: int = 60) -> str:
    """An answer, short enough for a report."""
    return repr(text if len(text) <= most else text[: most - 1] + "…")
