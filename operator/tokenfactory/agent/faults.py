"""What is known to be wrong with each GPU of the node, gathered from wherever it shows.

The judgement itself is `health`'s, and pure; here is what it judges, and what the agent found out by setting limits:
one that does not hold, one that does not bind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tokenfactory.agent.health import History, Verdict, assess, lemon_score
from tokenfactory.agent.nvml import Failure, FailureKind, Gpu, Identity, Reading, Wear, Xid
from tokenfactory.agent.xid import Action

MOST_FAULTS = 16
UNKNOWN = Verdict(healthy=True, action=Action.NONE)


@dataclass
class Faults:
    """Each `take_…` says whether that was news."""

    identity: Callable[[], Identity]
    xids: dict[int, int] = field(default_factory=dict)
    """How often each was seen."""
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    _links: dict[str, int] = field(default_factory=dict)
    _histories: dict[str, History] = field(default_factory=dict)
    _wear: dict[str, Wear | Failure] = field(default_factory=dict)
    _readings: dict[str, Reading | Failure] = field(default_factory=dict)
    _limits: dict[str, Failure] = field(default_factory=dict)
    _guard: dict[str, str] = field(default_factory=dict)

    def verdict(self, gpu: str) -> Verdict:
        return self.verdicts.get(gpu, UNKNOWN)

    def texts(self, gpu: str) -> tuple[str, ...]:
        own = [str(told[gpu]) for told in (self._limits, self._guard) if gpu in told]
        return (*self.verdict(gpu).faults, *own)[:MOST_FAULTS]

    def lemon_score(self, now: float) -> float:
        return lemon_score(self._histories.values(), now)

    def take_inventory(self, gpus: tuple[Gpu, ...]) -> None:
        """How many NVLinks were up when NVML was opened is how many there should be."""
        for gpu in gpus:
            self._links.setdefault(gpu.uuid, gpu.nvlinks_up)

    def take_event(self, event: Xid, now: float) -> bool:
        self.xids[event.code] = self.xids.get(event.code, 0) + 1
        history = self._histories.get(event.gpu, History())
        self._histories[event.gpu] = history.after(event, now, self.identity())
        return self._judge(event.gpu)

    def take_wear(self, gpu: str, wear: Wear | Failure) -> bool:
        self._wear[gpu] = wear
        return self._judge(gpu)

    def take_reading(self, gpu: str, reading: Reading | Failure) -> bool:
        self._readings[gpu] = reading
        return self._judge(gpu)

    def take_limit(self, gpu: str, failure: Failure | None) -> bool:
        before = self._limits.pop(gpu, None)
        if failure is not None:
            self._limits[gpu] = failure
        self._judge(gpu)
        return before != failure

    def take_guard(self, gpu: str, text: str | None) -> None:
        self._guard.pop(gpu, None)
        if text is not None:
            self._guard[gpu] = text

    def _judge(self, gpu: str) -> bool:
        limit = self._limits.get(gpu)
        gone = limit is not None and limit.kind in (FailureKind.TIMEOUT, FailureKind.LOST)
        verdict = assess(
            self._histories.get(gpu, History()),
            self.identity(),
            limit if limit is not None and gone else self._wear.get(gpu, Wear()),
            self._readings.get(gpu, Reading(0.0)),
            links_expected=self._links.get(gpu, 0),
        )
        before, self.verdicts[gpu] = self.verdict(gpu), verdict
        return (before.healthy, before.faults, before.action) != (
            verdict.healthy,
            verdict.faults,
            verdict.action,
        )
