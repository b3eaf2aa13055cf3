"""What may be set on a GPU besides its power limit, to get more tokens out of the same watts.

The limit alone keeps the power promise. These save joules where a profile was measured with them, and may fail without
any harm but to efficiency.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from tokenfactory.api.meta import Api
from tokenfactory.api.rules import Rule

WorkloadPowerProfile = Literal[
    "MaxP",
    "MaxQ",
    "Compute",
    "MemoryBound",
    "Network",
    "Balanced",
    "LLMInference",
    "LLMTraining",
    "HPC",
]
Megahertz = Annotated[int, Meta(ge=0, le=10_000)]


class ClockRange(Api, frozen=True, kw_only=True):
    """Where a GPU's clock is kept."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            rule="!has(self.minMHz) || self.minMHz <= self.maxMHz",
            message="minMHz must be at most maxMHz",
            advice="'minMHz %d is above maxMHz %d: write at most %d, or leave it out'"
            ".format([self.minMHz, self.maxMHz, self.maxMHz])",
            at=".minMHz",
        ),
    )

    min_mhz: Annotated[Megahertz, Meta(description="Lowest clock in MHz; 0: the GPU's own.")] = msgspec.field(
        name="minMHz", default=0
    )
    max_mhz: Annotated[int, Meta(ge=1, le=10_000, description="Highest clock in MHz.")] = msgspec.field(
        name="maxMHz"
    )


class Actuators(Api, frozen=True, kw_only=True):
    """What is set on each GPU of a model besides its power limit."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            rule="has(self.lockedClocks) || has(self.workloadPowerProfile)",
            message="actuators that set nothing: write lockedClocks or workloadPowerProfile, or leave actuators out",
        ),
    )

    locked_clocks: Annotated[
        ClockRange | None, Meta(description="The GPU's clock is kept in this range.")
    ] = None
    workload_power_profile: Annotated[
        WorkloadPowerProfile | None,
        Meta(description="One of NVIDIA's workload power profiles, on Blackwell and later."),
    ] = None
