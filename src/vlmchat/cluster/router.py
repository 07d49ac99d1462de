"""Which replica gets a request: the one that has most of its beginning, as `dispatch` chooses.

Made by Ray Serve in each front, for each model. It hears of every request's prefixes by the
arguments of `Replica.answer`; what lies where it knows from what it sent there and, after a start,
from what replicas tell. Ray asks the chosen replica for room, and takes the next one where it has
none.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from vlmchat.server.dispatch import CACHE_MARGIN

_KEPT_PREFIXES = 4096  # of each replica: some 400 kB


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A replica, as far as the choice goes. sent, told: beginnings that it has seen."""

    replica: RunningReplica
    queue_length: int
    sent: Container[str]
    told: Container[str]

    def known(self, prefixes: Sequence[str]) -> int:
        """How many of a request's prefixes, each longer than the one before, it has seen."""
        lengths = range(len(prefixes), 0, -1)
        return next((n for n in lengths if self._has(prefixes[n - 1])), 0)

    def _has(self, prefix: str) -> bool:
        return prefix in self.sent or prefix in self.told


def _best(able: list[_Candidate], prefixes: Sequence[str], margin: int) -> _Candidate:
    """As `dispatch.cache_aware`, which is for a thousand workers that are ordered already."""
    shortest = min(able, key=lambda one: one.queue_length)
    best = max(able, key=lambda one: (one.known(prefixes), -one.queue_length))
    return best if best.queue_length <= shortest.queue_length + margin else shortest


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """See the module."""

    def initialize_state(self, margin: int = CACHE_MARGIN) -> None:
        """margin: see `dispatch.cache_aware`."""
        self._margin = margin
        self._sent: dict[ReplicaID, OrderedDict[str, None]] = {}

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The best one, then, where it has no room, the others.

        Those that have failed this very request come last.
        """
        asked: dict[str, Any] = pending_request.kwargs if pending_request else {}
        if pending_request:
            pending_request.routing_context.should_backoff = True  # while all are full
        avoid = asked.get("avoid", ())
        fresh = [r for r in candidate_replicas if r.replica_id.unique_id not in avoid]
        able = [self._candidate(replica) for replica in fresh or candidate_replicas]
        if not able:
            return []
        best = _best(able, asked.get("prefixes", ()), self._margin)
        others = [one.replica for one in able if one is not best]
        return [[best.replica], others] if others else [[best.replica]]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Remember what lies there now; the oldest is forgotten."""
        sent = self._sent.setdefault(replica_id, OrderedDict())
        for prefix in pending_request.kwargs.get("prefixes", ()):
            sent[prefix] = None
            sent.move_to_end(prefix)
        while len(sent) > _KEPT_PREFIXES:
            sent.popitem(last=False)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Those that are gone are forgotten."""
        super().update_replicas(replicas)
        here = {replica.replica_id for replica in replicas}
        self._sent = {key: sent for key, sent in self._sent.items() if key in here}

    def _candidate(self, replica: RunningReplica) -> _Candidate:
        told = (replica.routing_stats or {}).get("prefixes", ())
        return _Candidate(
            replica,
            self.replica_queue_len_cache.get(replica.replica_id) or 0,
            self._sent.get(replica.replica_id, ()),
            frozenset(told),
        )
