"""Ray Serve asks "which replica?"; the pool has chosen, and this says so."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

Ranks = list[list[RunningReplica]]


class Chosen(RequestRouter):  # type: ignore[misc]
    """The first argument of every call names the replica that it is for; if Ray has lost that one, any other."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> Ranks:
        """The rank of the named one, then the rest: Ray takes the first that accepts."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # else it spins while none accepts
        wanted = pending_request.args[0]
        named = [r for r in candidate_replicas if r.replica_id.unique_id == wanted]
        return [named, [r for r in candidate_replicas if r not in named]]
