"""Text that grows token by token: half characters wait, and stop texts are found across tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "�"


class TextStream:
    """The text of one answer.

    Only the tokens since the last certain character are decoded again, so the cost per token is constant.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(getattr(tokenizer, "all_special_ids", ()) or ())
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._prefix = 0  # tokens before this one no longer influence new text
        self._read = 0  # tokens before this one are in `text`
        self.text = ""
        self._sent = 0
        self.is_stopped = False

    def add(self, token: int) -> str:
        """Take one token; return the text that became certain: no stop text can begin in it any more."""
        if self._tokenizer is None or self.is_stopped:
            return ""
        if self.push(token):
            self._extend(is_last=False)
        return self._release(len(self.text) - self._held_back())

    def push(self, token: int) -> bool:
        """Take one token without decoding it yet; special tokens have no text."""
        if token in self._special:
            return False
        self._ids.append(token)
        return True

    def finish(self) -> str:
        """Return what was held back."""
        if self._tokenizer is None or self.is_stopped:
            return ""
        self._extend(is_last=True)
        return self._release(len(self.text))

    def _extend(self, *, is_last: bool) -> None:
        before = self._tokenizer.decode(self._ids[self._prefix : self._read]) if self._read else ""
        after = self._tokenizer.decode(self._ids[self._prefix :]) if self._ids else ""
        if len(after) <= len(before) or (after.endswith(REPLACEMENT) and not is_last):
            return
        searched = max(0, len(self.text) - max(map(len, self._stop), default=0))
        self.text += after[len(before) :]
        self._prefix, self._read = self._read, len(self._ids)
        self._cut_at_stop(searched)

    def _cut_at_stop(self, start: int) -> None:
        found = [at for at in (self.text.find(stop, start) for stop in self._stop) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.is_stopped = True

    def _held_back(self) -> int:
        """Length of the longest end of the text that is the beginning of a stop text."""
        if self.is_stopped:
            return 0
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        sizes = range(min(longest, len(self.text)), 0, -1)
        return next((n for n in sizes if any(s.startswith(self.text[-n:]) for s in self._stop)), 0)

    def _release(self, end: int) -> str:
        piece = self.text[self._sent : end] if end > self._sent else ""
        self._sent = max(self._sent, end)
        return piece
