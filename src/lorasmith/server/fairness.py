"""Who is next: the tenant that got least, weighted; within a tenant, who came first.

The counters are virtual token counters ("Fairness in Serving Large Language Models", arXiv 2401.00588): a tenant is
charged for the tokens it may use when it is let in, and corrected when it is done. One that was away
starts level with those who wait, so nobody saves up.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lorasmith.errors import OverloadedError
from lorasmith.server.keys import Tenant

LONGEST_RETRY_S = 60.0


@dataclass(eq=False)
class Ticket:
    """A place in the queue, then in the engine, for `rows` rows and about `tokens` tokens."""

    tenant: Tenant
    rows: int
    tokens: int
    granted: asyncio.Future[None]
    since: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class _Line:
    served: float = 0.0
    waiting: deque[Ticket] = field(default_factory=deque)
    running: int = 0


class FairQueue:
    """Lets `max_rows` rows run at once. All methods belong to the event loop's thread."""

    def __init__(self, max_rows: int, *, max_waiting: int, max_waiting_per_tenant: int) -> None:
        self.max_rows = max_rows
        self._max_waiting = max_waiting
        self._max_per_tenant = max_waiting_per_tenant
        self._lines: dict[str, _Line] = {}
        self._preparing: Counter[str] = Counter()
        self.running_rows = 0
        self._seconds_per_request = 1.0

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return sum(len(line.waiting) for line in self._lines.values())

    def waiting_of(self, tenant: Tenant) -> int:
        """Requests of one tenant that wait."""
        line = self._lines.get(tenant.name)
        return 0 if line is None else len(line.waiting)

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs or waits."""
        return self.running_rows == 0 and self.waiting == 0

    @contextmanager
    def preparing(self, tenant: Tenant) -> Iterator[None]:
        """Around what happens to a request before it has a place here, such as tokenising.

        Raises:
            OverloadedError: as many of this tenant's requests, or of all, are there as may run and wait.
        """
        mine = self.max_rows + (tenant.max_waiting or self._max_per_tenant)
        is_full = self._preparing.total() >= self.max_rows + self._max_waiting
        if is_full or self._preparing[tenant.name] >= mine:
            raise OverloadedError("too many requests are being read already")
        self._preparing[tenant.name] += 1
        try:
            yield
        finally:
            self._preparing[tenant.name] -= 1

    async def enter(self, tenant: Tenant, rows: int, tokens: int) -> Ticket:
        """Wait for a turn; `leave` must follow.

        Raises:
            OverloadedError: too many wait already.
        """
        line = self._lines.setdefault(tenant.name, _Line())
        self._refuse_if_full(tenant, line)
        if not line.waiting and not line.running:
            busy = [x.served for x in self._lines.values() if x.waiting or x.running]
            line.served = max(line.served, min(busy, default=line.served))
        ticket = Ticket(tenant, rows, tokens, asyncio.get_running_loop().create_future())
        line.waiting.append(ticket)
        self._let_in()
        try:
            await ticket.granted
        except asyncio.CancelledError:
            self._withdraw(line, ticket)
            raise
        return ticket

    def leave(self, ticket: Ticket, used_tokens: int) -> None:
        """Give the rows back, and say how many tokens it really were."""
        line = self._lines[ticket.tenant.name]
        line.running -= 1
        line.served += (used_tokens - ticket.tokens) / ticket.tenant.weight
        self.running_rows -= ticket.rows
        took = time.monotonic() - ticket.since
        self._seconds_per_request += 0.1 * (took - self._seconds_per_request)
        self._let_in()

    def resize(self, max_rows: int) -> None:
        """There is more or less room from now on; who runs already stays."""
        self.max_rows = max_rows
        self._let_in()

    def _refuse_if_full(self, tenant: Tenant, line: _Line) -> None:
        mine = tenant.max_waiting or self._max_per_tenant
        if self.waiting < self._max_waiting and len(line.waiting) < mine:
            return
        turns = (self.waiting + 1) / max(1, self.max_rows)
        raise OverloadedError(
            "too many requests wait already", min(LONGEST_RETRY_S, 1 + turns * self._seconds_per_request)
        )

    def _let_in(self) -> None:
        while True:
            lines = [line for line in self._lines.values() if line.waiting]
            if not lines:
                return
            line = min(lines, key=lambda x: x.served)
            ticket = line.waiting[0]
            if ticket.granted.cancelled():
                line.waiting.popleft()
                continue
            # The next one waits for room even if a smaller one would fit: else large ones starve.
            if self.running_rows and self.running_rows + ticket.rows > self.max_rows:
                return
            line.waiting.popleft()
            line.running += 1
            line.served += ticket.tokens / ticket.tenant.weight
            self.running_rows += ticket.rows
            ticket.granted.set_result(None)

    def _withdraw(self, line: _Line, ticket: Ticket) -> None:
        if ticket in line.waiting:
            line.waiting.remove(ticket)
            self._let_in()
        elif not ticket.granted.cancelled():  # it was let in at the very moment it gave up
            self.leave(ticket, 0)
