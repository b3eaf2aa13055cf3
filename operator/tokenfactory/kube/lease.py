"""Leases: who leads, and who is alive.

Nobody's wall clock decides anything here. A leader trusts itself for the Lease's duration, counted on its own clock
from before it asked for the renewal; a candidate waits that long on its own clock from when it first saw the record
that has not changed since. Clocks may be wrong by hours, only their speed must agree.

Each change of leader raises the term (the Lease's `leaseTransitions`), also when the same process comes back: what
was written under an older term can be told apart.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from tokenfactory.api.meta import GROUP
from tokenfactory.kube.apply import Refused, Writer, Written
from tokenfactory.kube.backoff import Backoff
from tokenfactory.kube.cache import Cache, Change
from tokenfactory.kube.client import Client
from tokenfactory.kube.errors import ApiError, NotFoundError, UnreachableError
from tokenfactory.kube.objects import Lease, LeaseSpec
from tokenfactory.kube.resources import Key
from tokenfactory.kube.times import boot_seconds, micro_time

log = logging.getLogger(__name__)

HANDED_OVER: Final = f"{GROUP}/handed-over"
"""On a released Lease: `<term>:<claim from>`."""

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Term:
    """One leadership. After a crash (`released_cleanly` is false) the last writes of `previous` may still arrive."""

    number: int
    holder: str
    previous: str = ""
    released_cleanly: bool = False
    claim_from: int = 0
    """The lowest term from which on every leader up to this one ended with a clean hand-over: what was last written
    under an earlier one may yet be changed by a late write. Without such a hand-over it is this very term."""


class NotLeadingError(Exception):
    """A write was refused here, before it was sent: the leadership may be over."""


def _handed_over(lease: Lease, number: int) -> int:
    """The `claim_from` that the last leader left, if that leader was the last one; else the new term."""
    term, _, claim_from = lease.metadata.annotations.get(HANDED_OVER, "").partition(":")
    if term.isdigit() and claim_from.isdigit() and int(term) == number - 1:
        return min(int(claim_from), number)
    return number


@dataclass(slots=True)
class _Seen:
    """A record of somebody else, and since when it has not changed, on our clock."""

    lease: Lease
    since: float


@dataclass
class Election:
    """One candidate for one Lease. `identity` must be new with every process."""

    client: Client
    key: Key
    identity: str
    lease_seconds: int = 15
    renew_seconds: float = 3.0
    term_above: int = 0
    """The highest term seen elsewhere in the API: terms grow even if somebody deletes the Lease."""
    highest_term: Callable[[], Awaitable[int]] | None = None
    """Asked just before the leadership is taken; what it says counts like `term_above`."""
    clock: Clock = boot_seconds
    backoff: Backoff = field(default_factory=lambda: Backoff(0.2, 2.0))
    term: Term | None = field(default=None, init=False)
    _held: Lease | None = field(default=None, init=False)
    _trusted_until: float = field(default=0.0, init=False)
    _seen: _Seen | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._writer = Writer(self.client)
        if not 0 < self.renew_seconds * 2 <= self.lease_seconds:
            message = (
                f"a Lease of {self.lease_seconds} s cannot be kept by renewals every {self.renew_seconds} s: "
                "renew at least twice per lease"
            )
            raise ValueError(message)

    def still_leading(self, margin_seconds: float = 0.0) -> bool:
        """True while nobody else can have been elected, and will be for `margin_seconds` more."""
        return self.term is not None and self.clock() + margin_seconds < self._trusted_until

    def guard(self, margin_seconds: float) -> Callable[[], None]:
        """For a Client or Writer: refuses a write that might arrive after this leadership."""

        def check() -> None:
            if not self.still_leading(margin_seconds):
                message = f"{self.identity} no longer surely leads {self.key[1]}: the write was not sent"
                raise NotLeadingError(message)

        return check

    async def acquire(self) -> Term:
        """Wait until this process leads."""
        told = False
        while True:
            try:
                if await self._try_to_lead():
                    assert self.term is not None
                    log.info("leading", extra={"lease": self.key[1], "term": self.term.number})
                    return self.term
            except (ApiError, UnreachableError) as fault:
                log.warning("election for %s goes on: %s", self.key[1], fault)
            if not told:
                log.info("waiting for the leadership", extra={"lease": self.key[1]})
                told = True
            await asyncio.sleep(self.backoff.next())

    async def keep(self) -> None:
        """Renew until the leadership is lost, then return. Cancel it (and `release`) to stop leading."""
        while self.still_leading():
            await asyncio.sleep(min(self.renew_seconds, max(0.0, self._trusted_until - self.clock())))
            if not await self._renew():
                break
        log.error("leadership lost", extra={"lease": self.key[1]})
        self._drop()

    async def release(self, *, clean: bool = True) -> None:
        """Say that we are done, so that the next one need not wait; if `clean`, nor fear our last writes.

        Clean means that every write of ours was answered. From where on that was so is left in the Lease, bound to
        our term: whoever takes the Lease otherwise than from this release does not go by it.
        """
        held, term, leading = self._held, self.term, self.still_leading()
        self._drop()
        if held is None or term is None or not leading:
            return
        claim_from = term.claim_from if clean else term.number + 1
        annotations = {**held.metadata.annotations, HANDED_OVER: f"{term.number}:{claim_from}"}
        held = msgspec.structs.replace(
            held, metadata=msgspec.structs.replace(held.metadata, annotations=annotations)
        )
        spec = msgspec.structs.replace(
            held.spec, holder_identity="", lease_duration_seconds=1, renew_time=micro_time()
        )
        await self._writer.replace(msgspec.structs.replace(held, spec=spec), urgent=True)

    def _drop(self) -> None:
        self.term = None
        self._held = None
        self._trusted_until = 0.0

    async def _try_to_lead(self) -> bool:
        try:
            lease = await self.client.get(Lease, self.key, urgent=True, seconds=self.lease_seconds)
        except NotFoundError:
            number = await self._above() + 1
            term = Term(number, self.identity, claim_from=number)
            asked_at = self.clock()
            answer = await self._writer.create(Lease, self.key, {"spec": self._spec(term)}, urgent=True)
            return self._took(answer, term, asked_at)
        holder = lease.spec.holder_identity
        if holder and holder != self.identity and not self._expired(lease):
            return False
        # Our own name with no term here: an answer was lost. Taking it again costs a term, never safety.
        number = max(lease.spec.lease_transitions, await self._above()) + 1
        claim_from = number if holder else _handed_over(lease, number)
        term = Term(number, self.identity, holder, claim_from < number, claim_from)
        asked_at = self.clock()
        taken = msgspec.structs.replace(lease, spec=self._spec(term))
        return self._took(await self._writer.replace(taken, urgent=True), term, asked_at)

    async def _above(self) -> int:
        seen = await self.highest_term() if self.highest_term is not None else 0
        return max(seen, self.term_above)

    def _expired(self, lease: Lease) -> bool:
        now = self.clock()
        seen = self._seen
        if seen is None or seen.lease.metadata.resource_version != lease.metadata.resource_version:
            self._seen = _Seen(lease, now)
            return False
        return now - seen.since > lease.spec.lease_duration_seconds

    def _spec(self, term: Term) -> LeaseSpec:
        now = micro_time()
        return LeaseSpec(
            holder_identity=self.identity,
            lease_duration_seconds=self.lease_seconds,
            acquire_time=now,
            renew_time=now,
            lease_transitions=term.number,
        )

    def _took(self, answer: Written[Lease] | Refused, term: Term, asked_at: float) -> bool:
        if isinstance(answer, Refused):
            return False
        self.term = term
        self._held = answer.object
        self._trusted_until = asked_at + self.lease_seconds
        self._seen = None
        self.backoff.reset()
        return True

    async def _renew(self) -> bool:
        """Try until it is renewed, or lost. Each attempt ends well before the Lease does."""
        while self.still_leading():
            assert self._held is not None
            asked_at = self.clock()
            spec = msgspec.structs.replace(self._held.spec, renew_time=micro_time())
            try:
                answer = await asyncio.wait_for(
                    self._writer.replace(msgspec.structs.replace(self._held, spec=spec), urgent=True),
                    timeout=min(self.lease_seconds / 3, self._trusted_until - asked_at),
                )
                if isinstance(answer, Written):
                    self._held = answer.object
                    self._trusted_until = asked_at + self.lease_seconds
                    self.backoff.reset()
                    return True
                if not await self._still_ours():
                    return False
            except (ApiError, UnreachableError, TimeoutError) as fault:
                log.warning("renewal of %s goes on: %s", self.key[1], fault)
            await asyncio.sleep(self.backoff.next())
        return False

    async def _still_ours(self) -> bool:
        """After a conflict: was it our own renewal, whose answer was lost, or somebody else?"""
        assert self.term is not None
        try:
            lease = await self.client.get(Lease, self.key, urgent=True, seconds=self.lease_seconds / 3)
        except NotFoundError:
            return False
        spec = lease.spec
        if spec.holder_identity != self.identity or spec.lease_transitions != self.term.number:
            return False
        self._held = lease
        return True


@dataclass
class Heartbeat:
    """Says "I am alive" in a Lease of one's own. One request per beat, as kubelet does it."""

    client: Client
    key: Key
    holder: str
    every_seconds: float = 10.0
    beats: int = field(default=0, init=False)
    _held: Lease | None = field(default=None, init=False)

    async def run(self) -> None:
        """Beat for ever. A beat that fails is simply late: the next one says the same."""
        backoff = Backoff(0.2, self.every_seconds)
        while True:
            try:
                done = await self.beat()
            except (ApiError, UnreachableError) as fault:
                log.warning("heartbeat %s failed: %s", self.key[1], fault)
                self._held = None
                done = False
            if done:
                backoff.reset()
            await asyncio.sleep(self.every_seconds if done else backoff.next())

    async def beat(self) -> bool:
        """Renew once; false when the record was not as we knew it (the next beat knows better)."""
        writer = Writer(self.client)
        if self._held is None:
            try:
                self._held = await self.client.get(Lease, self.key, urgent=True)
            except NotFoundError:
                return self._note(await writer.create(Lease, self.key, {"spec": self._spec()}, urgent=True))
        lease = msgspec.structs.replace(self._held, spec=self._spec())
        return self._note(await writer.replace(lease, urgent=True))

    def _spec(self) -> LeaseSpec:
        return LeaseSpec(
            holder_identity=self.holder,
            lease_duration_seconds=max(1, round(self.every_seconds * 4)),
            renew_time=micro_time(),
        )

    def _note(self, answer: Written[Lease] | Refused) -> bool:
        self._held = answer.object if isinstance(answer, Written) else None
        self.beats += self._held is not None
        return self._held is not None


class Heartbeats:
    """How long each heartbeat has been silent, on our own clock, since we saw it change."""

    def __init__(self, cache: Cache[Lease], *, clock: Clock = boot_seconds) -> None:
        self._clock = clock
        self._seen: dict[Key, float] = {}
        cache.on_change(self._note)

    def _note(self, change: Change[Lease]) -> None:
        if change.new is None:
            self._seen.pop(change.key, None)
        elif change.old is None or change.old.spec.renew_time != change.new.spec.renew_time:
            self._seen[change.key] = self._clock()

    def silent_seconds(self, key: Key) -> float | None:
        """None when there is no such heartbeat. A fresh start gives everybody the benefit of one interval."""
        at = self._seen.get(key)
        return None if at is None else self._clock() - at
