"""Act: take the actions of a plan, one write each, in their order.

Nothing is decided here. A write that the API server refuses because the object has changed is not repeated: the
change comes through the caches, and the next plan knows better. Every `execute` is a crash point: whatever was
written stands, whatever was not will be planned again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from tokenfactory.api import names
from tokenfactory.api.cap_sheet import CapSheet, labels_of
from tokenfactory.api.checkpoint import Checkpoint
from tokenfactory.api.gpu_node import GPUNode, GPUNodeSpec
from tokenfactory.api.meta import ObjectMeta, OwnerReference, Resource
from tokenfactory.api.power_profile import PowerProfile
from tokenfactory.controller import actions as act
from tokenfactory.controller.owning import Taken, in_words, whose
from tokenfactory.controller.unsettled import Unsettled, touched
from tokenfactory.kube.apply import Precondition, Refused, Unchanged, Writer, Written
from tokenfactory.kube.client import MERGE, Client, Guard
from tokenfactory.kube.constraints import Expression, NodeSelectorTerm
from tokenfactory.kube.errors import ApiError, ConflictError, NotFoundError, UnreachableError
from tokenfactory.kube.events import Recorder
from tokenfactory.kube.objects import Node, Pod
from tokenfactory.kube.resources import Key, key_of, object_path
from tokenfactory.kube.times import boot_seconds

log = logging.getLogger(__name__)
_STATUS_SECONDS = 10.0


class _Named(msgspec.Struct, frozen=True):
    """Of somebody's object, which need not fit our types, no more than whose it is."""

    metadata: ObjectMeta


class Actor:
    """All writes of the controller. `guard` refuses them once we may no longer lead."""

    def __init__(
        self, client: Client, recorder: Recorder, guard: Guard, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._client = client
        self._recorder = recorder
        self._guard = guard
        self.writer = Writer(client, guard=guard)
        self._told_at: dict[tuple[str, Key], float] = {}
        self._due_at = math.inf
        """When the last of the statuses that are held back may be written."""
        self.unsettled = Unsettled()
        self.taken = Taken()
        self.written: dict[type[Resource], int] = {}
        """The newest version that our charges made, by kind: what the caches must show before the next plan."""
        self.writes = 0
        self.refused = 0
        self.idle = asyncio.Event()
        """No write is under way."""
        self.idle.set()
        self._under_way = 0
        self._closed = False

    def close(self) -> None:
        """Begin no further write; the one that is under way is awaited."""
        self._closed = True

    async def execute(
        self, actions: Sequence[act.Action], may_raise: Callable[[], bool] = lambda: True
    ) -> bool:
        """True when all were taken; false when some were refused or failed and a new plan is needed.

        Once `may_raise` says no, whatever could raise a charge is left to the next plan.
        """
        complete = True
        for action in actions:
            if self._closed:
                return False
            if _raises(action) and not may_raise():
                complete = False
                continue
            try:
                answer = await self._watched(action)
            except (ApiError, UnreachableError) as error:
                self.unsettled.note(action, error)
                log.warning("action failed", extra={"action": type(action).__name__, "error": str(error)})
                complete = False
                continue
            if isinstance(answer, Written) and isinstance(answer.object, CapSheet | GPUNode):
                kind, version = type(answer.object), int(answer.object.metadata.resource_version or 0)
                self.written[kind] = max(version, self.written.get(kind, 0))
            if isinstance(answer, Refused):
                self.refused += 1
                complete = False
                log.info("write refused", extra={"action": type(action).__name__, "why": answer.message})
            elif not isinstance(answer, Unchanged):
                self.writes += 1
                self._tell_of(action)
        return complete

    def begin_round(self) -> None:
        """All statuses are told anew. A cut beside the round tells none, and changes nothing of what is held back."""
        self._due_at = math.inf

    @property
    def seconds_to_status(self) -> float:
        """Until all statuses that were held back may be written: the next round must come by then, or they stay untold."""
        return max(0.0, self._due_at - self._clock())

    async def _watched(self, action: act.Action) -> Written[Any] | Unchanged | Refused:
        """One that is cancelled on its way stays under way: nobody knows what became of it."""
        self._under_way += 1
        self.idle.clear()
        try:
            answer = await self._take(action)
        except (ApiError, UnreachableError):
            self._answered()
            raise
        self._answered()
        return answer

    def _answered(self) -> None:
        self._under_way -= 1
        if not self._under_way:
            self.idle.set()

    async def _take(self, action: act.Action) -> Written[Any] | Unchanged | Refused:
        match action:
            case act.PublishSheet():
                return await self._publish(action)
            case act.ChargeNode(held, name, spec):
                return await self._charge(held, name, spec)
            case act.ApplyWorkload():
                return await self._apply(action)
            case act.DeleteWorkload(held) | act.Retire(held):
                return await self._delete(held, exact=isinstance(action, act.Retire))
            case act.OpenGate():
                return await self._open(action)
            case act.DeletePod(pod):
                return await self._delete(pod, exact=action.as_seen)
            case act.MarkPod(pod, cost):
                annotations = {names.DELETION_COST: cost}
                mark = {"metadata": {"uid": pod.metadata.uid, "annotations": annotations}}
                return await self._merge(object_path(Pod, key_of(pod)), mark)
            case act.TaintNode(node, version, taints):
                body = {"metadata": {"resourceVersion": version}, "spec": {"taints": list(taints)}}
                return await self._merge(object_path(Node, ("", node)), body)
            case act.RecordCheckpoint() | act.RecordProfile():
                return await self._record(action)
            case act.WriteStatus():
                return await self._status(action)
            case act.Tell():
                self._tell(action)
                return Unchanged()

    async def _apply(self, action: act.ApplyWorkload) -> Written[Any] | Refused:
        """Nobody else's object is touched: neither one that takes the place of ours, nor one that we did not know of."""
        metadata, slot = action.manifest["metadata"], (action.kind.KIND, action.key)
        factory = msgspec.convert(metadata["ownerReferences"][0], OwnerReference)
        held = action.held.metadata if action.held is not None else await self._named(action)
        if action.held is None and held is not None and whose(held, factory.name, factory.uid) == "Others":
            words = in_words(action.kind.KIND, held, factory.name)
            self.taken.note(slot, words, int(boot_seconds() * 1000))
            return Refused(words)
        self.taken.free(slot)
        # Made between our look and our write, somebody's object has fields of theirs, which without force are refused.
        return await self.writer.apply(
            action.kind,
            action.key,
            {"spec": action.manifest["spec"]},
            labels=metadata["labels"],
            owners=(factory,),
            only_if=Precondition(held.uid or "") if held is not None else Precondition(),
            force=held is not None,
        )

    async def _named(self, action: act.ApplyWorkload) -> ObjectMeta | None:
        """What the API server has under that name: our caches hold only what bears our label."""
        try:
            answer = await self._client.request("GET", object_path(action.kind, action.key), repeatable=True)
        except NotFoundError:
            return None
        return msgspec.json.decode(answer, type=_Named).metadata

    async def _record(
        self, action: act.RecordCheckpoint | act.RecordProfile
    ) -> Written[Any] | Unchanged | Refused:
        if isinstance(action, act.RecordCheckpoint):
            owners = (_owner(action.owner),)
            return await self.writer.apply(Checkpoint, action.key, {"spec": action.spec}, owners=owners)
        # Only ever a new one: what exists may be a person's.
        content, labels = {"spec": action.spec}, {names.LEARNED_LABEL: "true"}
        return await self.writer.create(PowerProfile, ("", action.name), content, labels=labels)

    async def _delete(self, held: Resource, *, exact: bool) -> Written[Any] | Refused:
        """A write like any other: it is counted, and people are told of it."""
        answer = await self.writer.delete(
            type(held), key_of(held), only_if=Precondition.of(held, exact=exact)
        )
        return answer if isinstance(answer, Refused) else Written(None)

    async def _status(self, action: act.WriteStatus) -> Written[Any] | Unchanged | Refused:
        """Every ten seconds at most, unless a condition changed."""
        slot = (type(action.held).KIND, key_of(action.held))
        now = self._clock()
        due = self._told_at.get(slot, -math.inf) + _STATUS_SECONDS
        if not action.urgent and now < due:
            self._due_at = due if self._due_at == math.inf else max(self._due_at, due)
            return Unchanged()
        answer = await self.writer.status(action.held, action.status)
        if isinstance(answer, Written):
            self._told_at[slot] = now
        return answer

    async def _publish(self, action: act.PublishSheet) -> Written[CapSheet] | Refused:
        """P5: only over the version that was planned on, only while we lead."""
        labels = labels_of(action.spec)
        if action.held is None:
            name = action.name or action.spec.domain
            return await self.writer.create(
                CapSheet, ("", name), {"spec": action.spec}, labels=labels, urgent=True
            )
        meta = msgspec.structs.replace(action.held.metadata, labels={**action.held.metadata.labels, **labels})
        sheet = msgspec.structs.replace(action.held, metadata=meta, spec=action.spec)
        return await self.writer.replace(sheet, urgent=True)

    async def _charge(self, held: GPUNode | None, name: str, spec: GPUNodeSpec) -> Written[GPUNode] | Refused:
        """A charge replaces the very version it was planned on; fence and quarantine are in it as they were."""
        if held is None:
            return await self.writer.create(GPUNode, ("", name), {"spec": spec})
        meta = touched(held.metadata) if spec == held.spec else held.metadata
        return await self.writer.replace(msgspec.structs.replace(held, metadata=meta, spec=spec))

    async def _open(self, action: act.OpenGate) -> Written[Any] | Refused:
        """Narrow the affinity, leave the checkpoint's name, remove our gate: one write, over one version."""
        pod = action.pod
        terms = narrowed(pod, action.node)
        affinity = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
        gates = [{"name": gate.name} for gate in pod.spec.scheduling_gates if gate.name != names.GATE]
        body: dict[str, Any] = {
            "metadata": {
                "uid": pod.metadata.uid,
                "resourceVersion": pod.metadata.resource_version,
                "annotations": {names.RESTORE_ANNOTATION: action.restore_from},
            },
            "spec": {"schedulingGates": gates, "affinity": {"nodeAffinity": affinity}},
        }
        return await self._merge(object_path(Pod, key_of(pod)), body)

    async def _merge(self, path: str, body: dict[str, Any]) -> Written[Any] | Refused:
        try:
            await self._client.request(
                "PATCH", path, body=body, content_type=MERGE, repeatable=True, guard=self._guard
            )
        except ConflictError as conflict:
            return Refused(str(conflict))
        except NotFoundError as missing:
            return Refused(str(missing), missing=True)
        return Written(None)

    def _tell_of(self, action: act.Action) -> None:
        match action:
            case act.OpenGate(pod, node, _, reason):
                self._tell(act.Tell(pod, "PowerGranted", f"to {node}: {reason}"))
            case act.DeletePod(pod, reason):
                self._tell(act.Tell(pod, "Replaced", reason, "Warning"))
            case _:
                reason = getattr(action, "reason", "")
                log.info("acted", extra={"action": type(action).__name__, "reason": reason})

    def _tell(self, event: act.Tell) -> None:
        self._recorder.event(event.about, event.reason, event.message, type=event.type)


def narrowed(pod: Pod, node: str) -> list[Any]:
    """Its node affinity, as some webhook may have written it, and only that node. A term may only be added to."""
    held = pod.spec.affinity.node_affinity.terms if pod.spec.affinity else ()
    only = Expression(key="metadata.name", operator="In", values=(node,))
    narrow = [
        msgspec.structs.replace(term, match_fields=(*term.match_fields, only))
        for term in held or (NodeSelectorTerm(),)
    ]
    return [msgspec.to_builtins(term) for term in narrow]


def _raises(action: act.Action) -> bool:
    return isinstance(action, act.ChargeNode | act.OpenGate) or (
        isinstance(action, act.PublishSheet) and not action.lowers
    )


def _owner(owner: Any) -> OwnerReference:
    return OwnerReference(
        api_version=owner.api_version,
        kind=type(owner).KIND,
        name=owner.metadata.name,
        uid=owner.metadata.uid or "",
        controller=True,
    )
