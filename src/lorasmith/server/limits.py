"""Rates per tenant. Time is the monotonic clock, so a clock that jumps changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

from lorasmith.errors import OverloadedError
from lorasmith.server.keys import Tenant


class Bucket:
    """A rate per minute, with a minute's worth to spend at once."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.capacity = per_minute
        self._clock = clock
        self._level = per_minute
        self._at = clock()

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` may be taken; more than a minute's worth needs a full bucket."""
        self._refill()
        return max(0.0, (min(amount, self.capacity) - self._level) * 60 / self.capacity)

    def take(self, amount: float) -> None:
        """Spend; a negative amount gives back."""
        self._refill()
        self._level = min(self.capacity, self._level - amount)

    def _refill(self) -> None:
        now = self._clock()
        self._level = min(self.capacity, self._level + (now - self._at) * self.capacity / 60)
        self._at = now


class Quotas:
    """The buckets of every tenant that has limits."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def reserve(self, tenant: Tenant, tokens: int) -> None:
        """Take one request and all tokens that it may use.

        Raises:
            OverloadedError: a limit is reached; then nothing was taken.
        """
        wanted = [
            (self._bucket(tenant, "requests", tenant.requests_per_minute), 1),
            (self._bucket(tenant, "tokens", tenant.tokens_per_minute), tokens),
        ]
        waits = [bucket.wait_s(amount) for bucket, amount in wanted if bucket is not None]
        if max(waits, default=0.0) > 0:
            raise OverloadedError("the rate limit of this key is reached", max(waits))
        for bucket, amount in wanted:
            if bucket is not None:
                bucket.take(amount)

    def give_back(self, tenant: Tenant, tokens: int) -> None:
        """Return tokens that were reserved and not used."""
        bucket = self._bucket(tenant, "tokens", tenant.tokens_per_minute)
        if bucket is not None:
            bucket.take(-tokens)

    def _bucket(self, tenant: Tenant, kind: str, per_minute: float | None) -> Bucket | None:
        if per_minute is None:
            return None
        key = (tenant.name, kind)
        if key not in self._buckets:
            self._buckets[key] = Bucket(per_minute, self._clock)
        return self._buckets[key]
