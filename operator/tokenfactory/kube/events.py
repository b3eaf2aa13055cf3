"""Kubernetes Events: what a person reads in `kubectl describe`.

The same thing said again raises a count instead of adding an object. The object's name follows from what it says, so
that this holds across restarts and for several processes. Saying something never waits and never fails the caller:
an Event is a courtesy, no record.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import msgspec

from tokenfactory.api.meta import Resource
from tokenfactory.kube.apply import builtins_of
from tokenfactory.kube.backoff import Backoff
from tokenfactory.kube.client import MERGE, Client
from tokenfactory.kube.errors import ApiError, ConflictError, NotFoundError, UnreachableError
from tokenfactory.kube.objects import Event, EventSeries, ObjectRef
from tokenfactory.kube.resources import Key, api_version_of, body_of, collection_path, object_path
from tokenfactory.kube.times import micro_time

log = logging.getLogger(__name__)

REMEMBERED: Final = 4096
LONGEST_NOTE: Final = 1024  # the API server's own limit


class _Said(NamedTuple):
    """What makes two events the same."""

    about: ObjectRef
    type: str
    reason: str
    action: str
    note: str

    def name(self) -> str:
        digest = hashlib.sha256(repr(self).encode()).hexdigest()
        return f"{self.about.name[:220]}.{digest[:16]}"

    def key(self) -> Key:
        return (self.about.namespace or "default", self.name())


@dataclass(slots=True)
class _Known:
    """An Event that is in the API, as far as we know."""

    count: int
    resource_version: str


def reference_to(obj: Resource) -> ObjectRef:
    kind = type(obj)
    return ObjectRef(
        api_version=api_version_of(kind),
        kind=kind.KIND,
        namespace=obj.metadata.namespace or "",
        name=obj.metadata.name,
        uid=obj.metadata.uid or "",
    )


class Recorder:
    """Takes events at once, sends them from `run()`; what is said again before it was sent is counted together."""

    def __init__(self, client: Client, *, controller: str, instance: str, waiting_limit: int = 1024) -> None:
        self._client = client
        self._controller = controller
        self._instance = instance
        self._waiting_limit = waiting_limit
        self._waiting: OrderedDict[_Said, int] = OrderedDict()
        self._known: OrderedDict[_Said, _Known] = OrderedDict()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.dropped = 0

    def event(
        self,
        about: Resource | ObjectRef,
        reason: str,
        note: str,
        *,
        type: Literal["Normal", "Warning"] = "Normal",  # noqa: A002 - Kubernetes' own word
        action: str = "Reconcile",
    ) -> None:
        reference = about if isinstance(about, ObjectRef) else reference_to(about)
        said = _Said(reference, type, reason, action, note[:LONGEST_NOTE])
        if said not in self._waiting and len(self._waiting) >= self._waiting_limit:
            self.dropped += 1
            return
        self._waiting[said] = self._waiting.get(said, 0) + 1
        self._idle.clear()
        self._wake.set()

    async def sent(self) -> None:
        """Return once nothing waits to be sent."""
        await self._idle.wait()

    async def run(self) -> None:
        backoff = Backoff(0.5, 30.0)
        while True:
            await self._wake.wait()
            while self._waiting:
                said, times = self._waiting.popitem(last=False)
                try:
                    await self._send(said, times)
                    backoff.reset()
                except (ApiError, UnreachableError) as fault:
                    self.dropped += times
                    log.warning("event %s not sent: %s", said.reason, fault)
                    await asyncio.sleep(backoff.next())
            self._wake.clear()
            self._idle.set()

    async def _send(self, said: _Said, times: int) -> None:
        known = self._known.get(said)
        if known is None:
            known = await self._create_or_find(said, times)
            if known is None:
                return None
        for _ in range(3):
            try:
                return await self._raise_count(said, known, times)
            except ConflictError:  # another process said the same meanwhile
                found = await self._client.get(Event, said.key())
                known = _Known(_count(found), found.metadata.resource_version or "")
            except NotFoundError:  # Events end after an hour: this one is new again
                self._known.pop(said, None)
                if await self._create_or_find(said, times) is None:
                    return None
        return None

    async def _create_or_find(self, said: _Said, times: int) -> _Known | None:
        """None when it is there now and says all; else what was there already and must be raised."""
        now = micro_time()
        event = Event(
            event_time=now, reporting_controller=self._controller, reporting_instance=self._instance,
            action=said.action, reason=said.reason, regarding=said.about, note=said.note, type=said.type,
            series=EventSeries(count=times, last_observed_time=now) if times > 1 else None,
        )  # fmt: skip
        namespace = said.key()[0]
        body = body_of(Event, said.key(), builtins_of(event))
        try:
            # Repeating is safe: the name is the content, and the time tells whether a conflict is with ourselves.
            answer = await self._client.request(
                "POST", collection_path(Event, namespace), body=body, repeatable=True
            )
        except ConflictError:
            found = await self._client.get(Event, said.key())
            known = _Known(_count(found), found.metadata.resource_version or "")
            if found.event_time == now and found.reporting_instance == self._instance:
                self._remember(said, known)
                return None
            return known
        self._remember(said, _Known(times, _version(answer)))
        return None

    async def _raise_count(self, said: _Said, known: _Known, times: int) -> None:
        """An absolute count over a known version: twice the same request counts once."""
        count = known.count + times
        body = {
            "metadata": {"resourceVersion": known.resource_version},
            "series": {"count": count, "lastObservedTime": micro_time()},
        }
        answer = await self._client.request(
            "PATCH", object_path(Event, said.key()), body=body, content_type=MERGE, repeatable=False
        )
        self._remember(said, _Known(count, _version(answer)))

    def _remember(self, said: _Said, known: _Known) -> None:
        self._known[said] = known
        self._known.move_to_end(said)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)


def _count(event: Event) -> int:
    return event.series.count if event.series else 1


def _version(answer: bytes) -> str:
    return msgspec.json.decode(answer, type=Event).metadata.resource_version or ""
