"""Key-value reuse between requests that begin alike.

A block of tokens is found again only by base, adapter digest, tenant and every token before it.
The key starts with a domain tag and each field carries its length, so no field can imitate another.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from lorasmith.engine.cache import KVCache


@dataclass(frozen=True)
class Owner:
    """Whose key-values these are."""

    base: str
    adapter_digest: str | None
    tenant: str

    def seed(self) -> bytes:
        """Start of the hash chain."""
        h = hashlib.sha256(b"lorasmith prefix v1")
        h.update(b"adapter" if self.adapter_digest else b"base")
        for field in (self.base, self.adapter_digest or "", self.tenant):
            raw = field.encode()
            h.update(len(raw).to_bytes(8, "little") + raw)
        return h.digest()


class PrefixCache:
    """Blocks of key-values by the chain of everything before them, the least recently used leaving first."""

    def __init__(self, max_bytes: int, block_tokens: int = 64) -> None:
        self.max_bytes = max_bytes
        self.block_tokens = block_tokens
        self.num_bytes = 0
        self._blocks: OrderedDict[bytes, list[Tensor]] = OrderedDict()

    def restore(self, owner: Owner, tokens: Sequence[int], cache: KVCache, row: int) -> int:
        """Fill the beginning of `row`; return how many tokens need not be computed.

        At least one token is always left, because its logits are needed.
        """
        done = 0
        for end, key in self._chain(owner, tokens, len(tokens) - 1):
            block = self._blocks.get(key)
            if block is None:
                break
            self._blocks.move_to_end(key)
            cache.reserve(end)
            cache.write(row, done, block)
            done = end
        return done

    def save(self, owner: Owner, tokens: Sequence[int], cache: KVCache, row: int) -> None:
        """Keep every whole block of `tokens`, which `row` holds."""
        for end, key in self._chain(owner, tokens, len(tokens)):
            if key not in self._blocks:
                block = cache.read(row, end - self.block_tokens, end)
                self._blocks[key] = block
                self.num_bytes += _bytes(block)
            self._blocks.move_to_end(key)
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= _bytes(self._blocks.popitem(last=False)[1])

    def clear(self) -> None:
        """Forget everything."""
        self._blocks.clear()
        self.num_bytes = 0

    def _chain(self, owner: Owner, tokens: Sequence[int], limit: int) -> Iterator[tuple[int, bytes]]:
        if self.max_bytes <= 0:
            return
        key, size = owner.seed(), self.block_tokens
        for end in range(size, limit + 1, size):
            block = b"".join(t.to_bytes(8, "little") for t in tokens[end - size : end])
            key = hashlib.sha256(key + block).digest()
            yield end, key


def _bytes(block: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in block)
