"""One object that the plan fails on must not end the power safety of all others.

The plan is made from what everybody wrote. Were an error in it to end the process each time, a factory in one namespace
that brings out a mistake of ours would keep every limit from being cut. So the plan is made once more without that
object, as if it could not be read: its pods keep their places and charges, and people are told. What charges are made
from (domains, sheets, nodes, pods) is never left out: an error there ends the process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, TypeVar

from tokenfactory.api.checkpoint import Checkpoint
from tokenfactory.api.power_profile import PowerProfile
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller.snapshot import Snapshot
from tokenfactory.kube.resources import Key

log = logging.getLogger(__name__)

T = TypeVar("T")
Slot = tuple[str, Key]
"""(kind, key)."""
FIELDS: Final = {
    TokenFactory.KIND: "factories",
    PowerProfile.KIND: "profiles",
    Checkpoint.KIND: "checkpoints",
}
AGAIN_MILLISECONDS: Final = 300_000
"""The cause may have been elsewhere, and gone."""
MOST_IN_A_ROUND: Final = 4
"""Each takes as many plans as it takes to halve all objects down to one."""


@dataclass(frozen=True)
class _Barred:
    version: str
    since_milliseconds: int
    why: str


class Barring(Generic[T]):
    """Plans without the objects on which `plan` fails, until they change or some time has passed."""

    def __init__(self, plan: Callable[[Snapshot], T]) -> None:
        self._plan = plan
        self._barred: dict[Slot, _Barred] = {}

    def __call__(self, snapshot: Snapshot) -> T:
        versions = _versions(snapshot)
        self._barred = {
            slot: barred
            for slot, barred in self._barred.items()
            if versions.get(slot) == barred.version
            and snapshot.milliseconds - barred.since_milliseconds < AGAIN_MILLISECONDS
        }
        for _ in range(MOST_IN_A_ROUND):
            try:
                return self._plan(self._without(snapshot))
            except Exception as error:
                log.exception("the plan failed: looking for the object that it fails on")
                slot = self._culprit(snapshot, versions)
                why = f"planning with it fails ({type(error).__name__}: {str(error)[:200]}), which is to be reported"
                self._barred[slot] = _Barred(versions[slot], snapshot.milliseconds, why)
                log.error("planning without it", extra={"kind": slot[0], "key": "/".join(slot[1])})  # noqa: TRY400
        # Too many for one round: what is in force stays as it is, limits are cut, and the next round looks further.
        return self._plan(self._without(snapshot, versions))

    def _culprit(self, snapshot: Snapshot, versions: Mapping[Slot, str]) -> Slot:
        """The last of the shortest beginning of all objects, oldest first, with which the plan fails."""
        free = [slot for slot in versions if slot not in self._barred]
        free.sort(key=lambda slot: (int(versions[slot] or 0), slot))
        self._plan(self._without(snapshot, free))  # raises where none of them is at fault
        works, fails = 0, len(free)
        while fails - works > 1:
            middle = (works + fails) // 2
            try:
                self._plan(self._without(snapshot, free[middle:]))
            except Exception:
                fails = middle
            else:
                works = middle
        return free[works]

    def _without(self, snapshot: Snapshot, more: Iterable[Slot] = ()) -> Snapshot:
        """As if these could not be read."""
        words = dict.fromkeys(more, "it may be one that planning fails with")
        words |= {slot: barred.why for slot, barred in self._barred.items()}
        if not words:
            return snapshot
        changes: dict[str, Any] = {
            name: {key: held for key, held in getattr(snapshot, name).items() if (kind, key) not in words}
            for kind, name in FIELDS.items()
        }
        uids = {
            (kind, key): held.metadata.uid or ""
            for kind, name in FIELDS.items()
            for key, held in getattr(snapshot, name).items()
            if (kind, key) in words
        }
        return replace(
            snapshot,
            undecodable={**snapshot.undecodable, **words},
            uids={**snapshot.uids, **uids},
            **changes,
        )


def _versions(snapshot: Snapshot) -> dict[Slot, str]:
    return {
        (kind, key): held.metadata.resource_version or ""
        for kind, name in FIELDS.items()
        for key, held in getattr(snapshot, name).items()
    }
