"""How often the agent does what."""

from __future__ import annotations

from dataclasses import dataclass

from tokenfactory.agent.kubelet_memory import SETTLE_SECONDS


@dataclass(frozen=True, slots=True)
class Pace:
    """How often what is done, in seconds. What must be quick is not here: it is not polled."""

    tick: float = 5.0
    """Govern at least this often, whatever happens: time passes."""
    busy: float = 0.25
    """While a call is outstanding or failed."""
    observe: float = 5.0
    pods: float = 5.0
    kubelet_settle: float = SETTLE_SECONDS
    """How long a kubelet that has just started may take to list its pods."""
    meter: float = 15.0
    node_power: float = 10.0
    tune: float = 5.0
    wear: float = 60.0
    inventory: float = 300.0
    report: float = 30.0
    reopen: float = 2.0
