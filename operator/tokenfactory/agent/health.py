"""Whether a GPU may be given work, why not, and how often it has been trouble: pure functions.

Two reasons for low clocks are never held against a GPU: the software power cap is our own cap at work, and the
hardware power brake is the facility's hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tokenfactory.agent.nvml import Failure, FailureKind, Identity, Reading, Reason, Recovery, Wear, Xid
from tokenfactory.agent.xid import Action, entry

MOST_INCIDENTS = 64
SAME_TROUBLE_SECONDS = 300.0
"""One fault logs many XIDs; within this time the same code is the same trouble."""
LEMON_HALF_LIFE_SECONDS = 14 * 86400.0

RECOVERIES: dict[Recovery, Action] = {
    Recovery.NONE: Action.NONE,
    Recovery.GPU_RESET: Action.RESET_GPU,
    Recovery.NODE_REBOOT: Action.REBOOT_NODE,
    Recovery.DRAIN_P2P: Action.INVESTIGATE,
    Recovery.DRAIN_AND_RESET: Action.RESET_GPU,
    Recovery.RECOVER_IMEX_DOMAIN: Action.INVESTIGATE,
    Recovery.BUS_RESET: Action.RESET_GPU,
    Recovery.SYSTEM_REBOOT: Action.REBOOT_NODE,
}


@dataclass(frozen=True, slots=True)
class Incident:
    """An XID that was logged, in which life of the driver."""

    code: int
    at_seconds: float
    identity: Identity


@dataclass(frozen=True, slots=True)
class History:
    """One GPU's past; bounded, so that a GPU in a loop of errors cannot fill the agent."""

    incidents: tuple[Incident, ...] = ()

    def after(self, event: Xid, now_seconds: float, identity: Identity) -> History:
        for known in self.incidents:
            if (
                known.code == event.code
                and known.identity == identity
                and now_seconds - known.at_seconds < SAME_TROUBLE_SECONDS
            ):
                return self
        kept = (*self.incidents, Incident(event.code, now_seconds, identity))[-MOST_INCIDENTS:]
        return replace(self, incidents=kept)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be thought of a GPU now."""

    healthy: bool
    """No new work where this is false."""
    action: Action
    faults: tuple[str, ...] = ()
    """Why it is not healthy."""
    notes: tuple[str, ...] = ()
    """Worth saying, not held against it."""
    facility: bool = False
    """The facility pulls the power brake: other nodes of the rack should show the same."""


def assess(
    history: History,
    identity: Identity,
    wear: Wear | Failure,
    reading: Reading | Failure,
    *,
    links_expected: int = 0,
) -> Verdict:
    """From what is known now. `links_expected`: how many NVLinks were up when NVML was opened."""
    faults: list[str] = []
    notes: list[str] = []
    actions = [Action.NONE]
    for failure in {answer for answer in (wear, reading) if isinstance(answer, Failure)}:
        _unanswered(failure, faults, notes, actions)
    for incident in history.incidents:
        known = entry(incident.code)
        if incident.identity != identity:
            continue  # whatever it was, the driver has been loaded anew since
        actions.append(known.action)
        if known.fatal:
            faults.append(f"XID {incident.code}: {known.meaning}")
        elif known.action is not Action.NONE:
            notes.append(f"XID {incident.code}: {known.meaning}")
    if isinstance(wear, Wear):
        _worn(wear, links_expected, faults, notes, actions)
    facility = False
    if isinstance(reading, Reading) and reading.reasons is not None:
        facility = _slowed(reading, notes)
    action = max(actions, key=lambda action: action.strength)
    return Verdict(not faults, action, tuple(dict.fromkeys(faults)), tuple(dict.fromkeys(notes)), facility)


def _unanswered(failure: Failure, faults: list[str], notes: list[str], actions: list[Action]) -> None:
    if failure.kind is FailureKind.LOST:
        faults.append("lost: it no longer answers on the bus")
        actions.append(Action.REBOOT_NODE)
    elif failure.kind is FailureKind.TIMEOUT:
        faults.append(f"a call to it hangs: {failure.call}")
        actions.append(Action.INVESTIGATE)
    elif failure.kind is FailureKind.DRIVER_GONE:
        faults.append("the driver is gone")
    elif failure.kind is not FailureKind.NOT_SUPPORTED:
        notes.append(str(failure))


def _worn(
    wear: Wear, links_expected: int, faults: list[str], notes: list[str], actions: list[Action]
) -> None:
    if wear.recovery is not None and wear.recovery is not Recovery.NONE:
        faults.append(f"the driver asks for recovery: {wear.recovery.name}")
        actions.append(RECOVERIES[wear.recovery])
    if wear.remap_failed:
        faults.append("a memory row could not be remapped: the board needs replacing")
        actions.append(Action.INVESTIGATE)
    elif wear.remap_pending:
        notes.append("memory rows wait for a reset to be remapped")
    if wear.nvlinks_up is not None and wear.nvlinks_up < links_expected:
        faults.append(f"{links_expected - wear.nvlinks_up} of {links_expected} NVLinks are down")
        actions.append(Action.INVESTIGATE)
    if wear.fabric is not None and not wear.fabric.healthy:
        faults.append(f"its NVLink fabric is not healthy (state {wear.fabric.state})")
        actions.append(Action.INVESTIGATE)
    if wear.ecc_volatile_uncorrected:
        notes.append(f"{wear.ecc_volatile_uncorrected} uncorrected memory errors since the driver was loaded")
    if wear.persistence is False:
        notes.append("persistence mode is off: its limit is lost whenever nothing has it open")


def _slowed(reading: Reading, notes: list[str]) -> bool:
    """True when the facility slows it down."""
    reasons = reading.reasons or Reason(0)
    brake = Reason.HW_POWER_BRAKE in reasons
    if brake:
        notes.append("the facility's power brake is on")
    if Reason.HW_THERMAL in reasons or (Reason.HW_SLOWDOWN in reasons and not brake):
        at = "" if reading.celsius is None else f" at {reading.celsius} °C"
        notes.append(f"hardware thermal slowdown{at}")
    elif Reason.SW_THERMAL in reasons:
        notes.append("slowed by the driver because of its temperature")
    return brake


def lemon_score(histories: Iterable[History], now_seconds: float) -> float:
    """How much trouble a node's GPUs have been lately: each incident counts its weight, halved every fortnight."""
    return sum(
        entry(incident.code).weight
        * math.pow(0.5, max(0.0, now_seconds - incident.at_seconds) / LEMON_HALF_LIFE_SECONDS)
        for history in histories
        for incident in history.incidents
    )
