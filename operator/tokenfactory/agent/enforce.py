"""Setting caps and knowing what holds: every GPU at once, each read back, none waiting for another.

What is believed of a GPU's limit is only what was read back in this boot and this life of the driver. A GPU whose
call hangs or fails keeps the last limit that was read; it is not counted as capped until a reading says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tokenfactory.agent.nvml import Failure, FailureKind, Gpu, Identity, Limits, Nvml, Reading
from tokenfactory.agent.parts import Clock


@dataclass(frozen=True, slots=True)
class Held:
    """One GPU's limit as far as it is known."""

    limits: Limits | None = None
    asked_milliwatts: int | None = None
    """What we last wanted; None before we ever did."""
    set_in: Identity | None = None
    """The boot and driver in which a limit of ours was read back."""
    read_in: Identity | None = None
    since: float = 0.0
    """When the enforced limit last changed."""
    failure: Failure | None = None
    """Why the last attempt did not end in a limit that obeys."""
    failures: int = 0
    """How often in a row the same limit failed."""
    retry_at: float = 0.0

    @property
    def enforced_milliwatts(self) -> int | None:
        return self.limits.enforced_milliwatts if self.limits else None


class Enforcer:
    """The limits of all GPUs of the node."""

    def __init__(self, nvml: Nvml, clock: Clock) -> None:
        self._nvml = nvml
        self._clock = clock
        self.held: dict[str, Held] = {}
        self.sets = 0
        self.resets_found = 0

    def adopt(self, gpus: tuple[Gpu, ...]) -> None:
        """Take in what an inventory read: the limits found are what holds now."""
        identity, now = self._nvml.identity, self._clock.monotonic()
        fresh = {uuid: replace(held, read_in=None) for uuid, held in self.held.items()}
        for gpu in gpus:
            before = fresh.get(gpu.uuid, Held())
            fresh[gpu.uuid] = (
                replace(before, limits=gpu.limits, read_in=identity, since=now) if gpu.limits else before
            )
        self.held = fresh

    def learn(self, gpu: str, limits: Limits) -> None:
        """A GPU that told nothing when it was looked through tells its limits now."""
        held = self.held.get(gpu, Held())
        self.held[gpu] = replace(
            held, limits=limits, read_in=self._nvml.identity, since=self._clock.monotonic()
        )

    def notice(self, gpu: str, reading: Reading) -> bool:
        """Take in a reading; True when the limit is no longer what we set (a reset, a BMC, another hand)."""
        held = self.held.get(gpu)
        enforced = reading.enforced_milliwatts
        if held is None or held.limits is None or enforced is None:
            return False
        if enforced == held.limits.enforced_milliwatts and held.read_in == self._nvml.identity:
            return False
        limits = replace(held.limits, enforced_milliwatts=enforced)
        self.held[gpu] = replace(
            held, limits=limits, since=self._clock.monotonic(), read_in=self._nvml.identity
        )
        risen = held.asked_milliwatts is not None and enforced > held.asked_milliwatts and not held.failure
        self.resets_found += risen
        return True

    def lose(self, gpu: str) -> bool:
        """It no longer answers: what was read before says nothing about now. True when that is news."""
        held = self.held.get(gpu)
        if held is None or held.read_in is None:
            return False
        self.held[gpu] = replace(held, read_in=None)
        return True

    def limits(self, gpu: Gpu) -> Limits | None:
        held = self.held.get(gpu.uuid)
        return (held.limits if held else None) or gpu.limits

    def enforced(self, gpu: str) -> int | None:
        """The limit in force; None when it cannot be known: not read in this boot, or a call is outstanding."""
        held = self.held.get(gpu)
        if held is None or held.limits is None or gpu in self._nvml.stuck:
            return None
        return held.limits.enforced_milliwatts if held.read_in == self._nvml.identity else None

    def obeys(self, gpu: str, cap_milliwatts: int) -> bool:
        enforced = self.enforced(gpu)
        return enforced is not None and enforced <= cap_milliwatts

    def wanted(self, caps: Mapping[str, int]) -> dict[str, int]:
        """The GPUs whose limit must be set for these caps: it differs from what we asked for, or does not hold."""
        now = self._clock.monotonic()
        todo = {}
        for gpu, cap in caps.items():
            held = self.held.get(gpu)
            if held is None or held.limits is None:
                continue  # its range is not known: nothing sensible can be asked for, nothing is acknowledged
            target = held.limits.clamp(cap)
            same = held.asked_milliwatts == target
            if same and held.set_in == self._nvml.identity and self.obeys(gpu, target):
                continue
            if not same or now >= held.retry_at:
                todo[gpu] = target
        return todo

    async def set(self, gpu: str, milliwatts: int) -> Failure | None:
        """Set one limit and read it back; says why it does not hold, if it does not."""
        identity = self._nvml.identity
        before = self.held[gpu]
        self.sets += 1
        answer = await self._nvml.set_limit(gpu, milliwatts)
        now = self._clock.monotonic()
        held = self.held.get(gpu, before)
        if isinstance(answer, Failure):
            failed = held.failures + 1 if held.asked_milliwatts == milliwatts else 1
            self.held[gpu] = replace(
                held,
                asked_milliwatts=milliwatts,
                set_in=None,
                failures=failed,
                retry_at=now + _pause(failed),
                failure=answer,
            )
            return answer
        failure = None
        if not answer.obeys(milliwatts):
            text = f"{milliwatts} mW asked for, {answer.enforced_milliwatts} mW enforced"
            failure = Failure(FailureKind.REFUSED, "the limit did not take", gpu, 0, text)
        failed = (
            held.failures + 1 if failure and held.asked_milliwatts == milliwatts else int(failure is not None)
        )
        changed = held.enforced_milliwatts != answer.enforced_milliwatts
        self.held[gpu] = Held(
            limits=answer,
            asked_milliwatts=milliwatts,
            set_in=identity,
            read_in=identity,
            since=now if changed else held.since,
            failure=failure,
            failures=failed,
            retry_at=now + _pause(failed) if failure else 0.0,
        )
        return failure


def _pause(failures: int) -> float:
    """Seconds before the same limit is tried again: at once first, then ever less often."""
    return float(min(10.0, 0.25 * 2 ** min(failures - 1, 10)))
