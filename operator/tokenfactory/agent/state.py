"""What an agent knows at one moment, in one place: the loop writes it, the report and the metrics read it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from tokenfactory.agent.faults import Faults
from tokenfactory.agent.guard import Guard
from tokenfactory.agent.holders import Holdings
from tokenfactory.agent.nvml import Driver, Failure, FailureKind, Gpu, Reading
from tokenfactory.agent.parts import PodDevices
from tokenfactory.api.actuators import Actuators
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.planning.power.governor import Decision, Memory, Readback

WITHIN: Final = "WithinCharge"
ABOVE: Final = "AboveCharge"
"""The whole node's guard withholds power."""
UNREADABLE: Final = "Unreadable"
VERDICTS: Final = (WITHIN, ABOVE, UNREADABLE)
"""What status and metrics say of the node's own meter."""


@dataclass
class NodePower:
    """What the node's own meter told."""

    draw_milliwatts: int | None = None
    """None: not read, or not to be believed."""
    problem: str = "its meter was not read yet"
    overhead_milliwatts: int = 0
    """Besides its GPUs, at most, with a margin; 0 until enough was seen."""
    overhead_proven: bool = False
    """Measured under load for so long that less than the worst case may be charged."""
    above: str = ""
    """Why the guard has cut this node's caps."""
    cuts: int = 0
    failures: int = 0

    @property
    def verdict(self) -> str:
        if self.above:
            return ABOVE
        return UNREADABLE if self.problem else WITHIN


PEAK_SECONDS: Final = 60.0
"""Two reports long: whatever is drawn at one moment, every node's next report and the one after it still tell of it."""


@dataclass
class Draws:
    """What all GPUs drew together at each reading of the last minute."""

    _seen: deque[tuple[float, int]] = field(default_factory=deque)

    def note(self, now: float, milliwatts: int) -> None:
        while self._seen and now - self._seen[0][0] > PEAK_SECONDS:
            self._seen.popleft()
        self._seen.append((now, milliwatts))

    def peak(self, now: float) -> int:
        return max((milliwatts for at, milliwatts in self._seen if now - at <= PEAK_SECONDS), default=0)


@dataclass
class AgentState:
    """Mutable, and only the loop mutates it."""

    name: str
    faults: Faults
    node: GPUNode | None = None
    """The last one whose trees were all heard of: what is obeyed."""
    driver: Driver | None = None
    gpus: tuple[Gpu, ...] = ()
    missing: tuple[Failure, ...] = ()
    """GPUs that NVML counts and does not hand out."""
    readings: dict[str, Reading] = field(default_factory=dict)
    draws: Draws = field(default_factory=Draws)
    pods: tuple[PodDevices, ...] | None = None
    """None until the kubelet has answered once."""
    pods_problem: str = ""
    holdings: Holdings = field(default_factory=Holdings)
    memory: Memory = field(default_factory=Memory)
    decision: Decision | None = None
    readback: Readback | None = None
    observed_generation: int = 0
    guard: Guard = field(default_factory=dict)
    inherited: dict[str, int] = field(default_factory=dict)
    """What an agent before us withheld from each GPU in this boot, in milliwatts: limits were found without it."""
    tuned: dict[str, Actuators] = field(default_factory=dict)
    """What is set on each GPU besides its limit."""
    looked_at: set[str] = field(default_factory=set)
    """GPUs of which this process knows what is set."""
    untuned: dict[str, Failure] = field(default_factory=dict)
    """Why that is not as asked."""
    node_power: NodePower = field(default_factory=NodePower)
    metered: bool = False
    """The node has a meter of its own, which is read."""
    open_failure: Failure | None = None
    steps: int = 0

    @property
    def unknown(self) -> tuple[Failure, ...]:
        """GPUs that may be at work, for all one knows; one that fell off the bus is not."""
        return tuple(it for it in self.missing if it.kind is not FailureKind.LOST)
