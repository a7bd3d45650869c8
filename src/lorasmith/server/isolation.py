"""The isolation proof: a share of the answers is computed again, alone, and must be the same bits.

The reference is an engine of its own in deterministic mode: its own cache, no reuse between requests, and
the adapter read again from the store by its digest. Tokens and their log-probabilities are compared exactly.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from lorasmith.engine import Engine, Request, Result
from lorasmith.errors import LoraSmithError
from lorasmith.store import Lease

Outcome = Literal["match", "mismatch", "skipped", "failed"]
log = logging.getLogger("lorasmith.server")


@dataclass(frozen=True)
class Check:
    """An answer that was given, and what was asked."""

    request: Request
    digest: str | None
    result: Result
    request_id: str


class Shadow:
    """Compares in a thread of its own.

    Args:
        reference: a deterministic engine with as many rows as the serving one, and no prefix cache.
        lease: an adapter's files by its digest.
        report: called with each outcome.
        share: of the requests; at most `max_waiting` comparisons wait, more are skipped.
    """

    def __init__(
        self,
        reference: Engine,
        lease: Callable[[str], Lease],
        report: Callable[[Outcome], None],
        *,
        share: float,
        max_waiting: int,
    ) -> None:
        self._reference = reference
        self._lease = lease
        self._report = report
        self._share = share
        self._checks: queue.Queue[Check | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._run, name="lorasmith-shadow", daemon=True)
        self._thread.start()

    def picks(self) -> bool:
        """Whether this request is one of the share."""
        return random.random() < self._share

    def offer(self, check: Check) -> None:
        """Compare when there is time; never waits."""
        if check.result.finish_reason not in ("stop", "length"):
            return
        try:
            self._checks.put_nowait(check)
        except queue.Full:
            self._report("skipped")

    def close(self) -> None:
        """Finish the comparison at hand and stop."""
        try:
            while True:
                self._checks.get_nowait()
        except queue.Empty:
            self._checks.put(None)
        self._thread.join()
        self._reference.close()

    def _run(self) -> None:
        while (check := self._checks.get()) is not None:
            try:
                alone = self._alone(check)
            except LoraSmithError as error:  # removed from the store meanwhile, mostly
                log.warning("shadow run failed", extra={"fields": {"why": type(error).__name__}})
                self._report("failed")
                continue
            self._report("match" if _is_same(alone, check.result) else "mismatch")
            if not _is_same(alone, check.result):
                _log_mismatch(check, alone)

    def _alone(self, check: Check) -> Result:
        request = replace(check.request, tenant="")
        if check.digest is None:
            return self._reference.generate([request])[0]
        lease = self._lease(check.digest)
        try:
            self._reference.add_adapter(check.digest, lease.path)
            try:
                return self._reference.generate([request])[0]
            finally:
                self._reference.remove_adapter(check.digest)
        finally:
            lease.release()


def _is_same(alone: Result, served: Result) -> bool:
    return (alone.token_ids, alone.logprobs, alone.finish_reason, alone.adapter_digest) == (
        served.token_ids, served.logprobs, served.finish_reason, served.adapter_digest,
    )  # fmt: skip


def _log_mismatch(check: Check, alone: Result) -> None:
    pairs = zip(alone.token_ids, check.result.token_ids, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    fields = {
        "request_id": check.request_id, "digest": check.digest, "first_other_token": first,
        "tokens_served": len(check.result.token_ids), "tokens_alone": len(alone.token_ids),
        "tokens_reused": check.result.reused_tokens,
    }  # fmt: skip
    log.error("isolation mismatch: this answer is another one when computed alone", extra={"fields": fields})
