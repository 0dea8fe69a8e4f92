"""What each worker said of itself, and the bytes that went to it and came back."""

from __future__ import annotations

import collections
from typing import Any

from evoopt.distributed.scheduler import Scheduler


class Books:
    """Facts and bytes by worker; those of workers that were lost long ago are added up as `earlier`."""

    def __init__(self) -> None:
        self.facts: dict[str, dict[str, Any]] = {}  # node, pid, ...
        self.sent: collections.Counter[str] = collections.Counter()
        self.received: collections.Counter[str] = collections.Counter()

    def where(self, worker: str) -> str:
        """A worker's name, node and process, for messages."""
        facts = self.facts.get(worker, {})
        return f"{worker} (node {facts.get('node', 'unknown')}, process {facts.get('pid', 'unknown')})"

    def forget(self, scheduler: Scheduler) -> None:
        """Add up what belongs to workers that the scheduler no longer counts one by one."""
        gone = [name for name in self.sent if name not in scheduler.tallies]
        for counter in (self.sent, self.received):
            counter["earlier"] += sum(counter.pop(name, 0) for name in gone if name != "earlier")
        for name in gone:
            self.facts.pop(name, None)

    def shares(self, scheduler: Scheduler) -> dict[str, dict[str, Any]]:
        """Each worker's share: of those that are alive, of the last that were lost, and `earlier`, of the others."""
        shares = {**scheduler.tallies, "earlier": scheduler.crew.lost}
        return {
            name: {
                "node": self.facts.get(name, {}).get("node", ""), "alive": name in scheduler.workers,
                "answers": tally.answers, "slices": tally.slices, "lost": tally.lost,
                "seconds": round(tally.seconds, 3), "bytes_sent": self.sent[name],
                "bytes_received": self.received[name],
            } for name, tally in shares.items() if name != "earlier" or tally.slices or tally.lost
        }  # fmt: skip
