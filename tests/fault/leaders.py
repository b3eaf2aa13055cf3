"""What leaders do: they run the shipped ledger on what they have heard."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
from tests.fault.parts import OVERHEAD, Leader, Message, Parts, version_of

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.gpu_node import Fence, GPUNode, GPUNodeSpec, PodGrant
from tokenfactory.planning.power import grants, ledger, sheets


class Leaders(Parts):
    def elect(self, *, clean: bool) -> Leader:
        """A new process leads. After anything but a clean hand-over, what was under way may still land."""
        self.term += 1
        if not clean:
            self.claim_from = self.term
        leader = Leader(
            pid=self.next_pid,
            term=self.term,
            claim_from=self.claim_from if self.kit.claims else 0,
            site=self.site,
            sheets=dict(self.sheets),
            nodes=dict(self.nodes),
            heard=frozenset(self.machines),
            revision=self.revision,
        )
        self.next_pid += 1
        self.leaders.append(leader)
        return leader

    def send(
        self, leader: Leader, kind: str, name: str, body: Any, version: int, *, touch: bool = False
    ) -> None:
        key = (kind, name)
        if kind != "renew":
            leader.outstanding[key] = version
        limits = {n: d.usable_milliwatts for n, d in leader.site.domains.items()}
        self.inflight.append(Message(leader.pid, kind, name, body, version, limits, touch))

    def give_up(self, leader: Leader) -> None:
        """The leader stops waiting for answers: those writes may or may not land."""
        for (kind, name), version in leader.outstanding.items():
            seen = (leader.nodes if kind == "node" else leader.sheets).get(name)
            if version_of(seen) <= version:
                leader.unsettled[kind, name] = version
        leader.outstanding.clear()

    def lead_sheets(self, leader: Leader) -> bool:
        if any(kind == "sheet" for kind, _ in leader.outstanding):
            return False
        plan = self.kit.plan_sheets(self.ledger(leader), leader.site.targets)
        for write in plan.writes:
            self.send(
                leader,
                "sheet",
                write.spec.domain,
                write.spec,
                int(write.resource_version or 0),
                touch=write.why == "Claim",
            )
        return bool(plan.writes)

    def lead_renewal(self, leader: Leader, root: str) -> None:
        present = self.renewals.get(f"{root}.renewal")
        spec = sheets.renewed(
            present.spec if present is not None else None, root, term=leader.term, wall_ms=0
        )
        self.send(leader, "renew", f"{root}.renewal", spec, version_of(present))

    def lead_nodes(self, leader: Leader) -> bool:
        """At most one new spec per node: what is due there first."""
        book = self.ledger(leader)
        sent = False
        for name, node in leader.nodes.items():
            if ("node", name) in leader.outstanding:
                continue
            spec = self._next_spec(leader, book, node)
            touch = ("node", name) in leader.unsettled
            if spec is None or (spec == node.spec and not touch):
                continue
            spec = msgspec.structs.replace(spec, term=leader.term, overhead_milliwatts=OVERHEAD)
            if spec == node.spec and not touch:
                continue
            self.send(leader, "node", name, spec, version_of(node), touch=touch)
            book = book.with_node(msgspec.structs.replace(node, spec=spec))
            sent = True
        return sent

    def _next_spec(self, leader: Leader, book: ledger.Ledger, node: GPUNode) -> GPUNodeSpec | None:
        name = node.metadata.name
        facts = book.entries[name].facts
        if node.spec.term < leader.claim_from or ("node", name) in leader.unsettled:
            return msgspec.structs.replace(node.spec, term=leader.term)
        path = leader.site.paths[name]
        if node.spec.path != path:
            return self.kit.moved(node, path)
        machine = self.machines[name]
        if node.spec.fence is None and name not in leader.heard and not machine.on:
            fence = Fence(method="PowerOff", by="bmc", at="", boot_id=node.status.boot_id)
            return msgspec.structs.replace(node.spec, fence=fence)
        if node.spec.fence is not None and name in leader.heard and book.admit_return(name):
            return msgspec.structs.replace(node.spec, fence=None)
        if node.spec.former_paths and (spec := self.kit.settled_path(node)) != node.spec:
            if book.admit_spec(msgspec.structs.replace(node, spec=spec)):
                return spec
            return None
        for grant in node.spec.pods:
            if not grant.released and self.pods[grant.uid].deleted:
                return grants.released(node, grant.uid)
        if (spec := self.kit.collected(node, facts)) != node.spec:
            return spec
        return self._next_grant(book, node)

    def _next_grant(self, book: ledger.Ledger, node: GPUNode) -> GPUNodeSpec | None:
        name = node.metadata.name
        listed = {grant.uid for grant in node.spec.pods}
        taken = sum(grant.gpus for grant in node.spec.pods)
        for pod in self.pods.values():
            if pod.node != name or pod.deleted or pod.uid in listed:
                continue
            fits = taken + pod.gpus <= len(self.machines[name].gpus)
            if fits and book.admit(name, pod.class_name, pod.gpus):
                grant = PodGrant(
                    namespace="ns", name=pod.uid, uid=pod.uid, class_name=pod.class_name, gpus=pod.gpus
                )
                return grants.granted(node, grant)
        return None

    def lead_ungate(self, leader: Leader) -> bool:
        """A pod's gate goes once its grant has landed."""
        done = False
        for node in leader.nodes.values():
            for grant in node.spec.pods:
                pod = self.pods[grant.uid]
                if not grant.released and not pod.ungated and not pod.deleted:
                    self.pods[grant.uid] = replace(pod, ungated=True)
                    done = True
        return done

    def next_node_event(self, leader: Leader) -> None:
        fold_node(leader, leader.node_queue.pop(0))

    def next_site_event(self, leader: Leader) -> None:
        leader.site = leader.site_queue.pop(0)

    def next_sheet_event(self, leader: Leader) -> None:
        gone = leader.sheet_queue.pop(0)
        leader.sheets.pop(gone.name, None)
        leader.revision = gone.revision


def fold_node(leader: Leader, node: GPUNode) -> None:
    name = node.metadata.name
    if version_of(node) >= version_of(leader.nodes.get(name)):
        leader.nodes[name] = node
    _settle(leader, ("node", name), version_of(node))


def fold_sheet(leader: Leader, sheet: CapSheet) -> None:
    name = sheet.metadata.name
    if version_of(sheet) >= version_of(leader.sheets.get(name)):
        leader.sheets[name] = sheet
    _settle(leader, ("sheet", name), version_of(sheet))


def _settle(leader: Leader, key: tuple[str, str], seen: int) -> None:
    """A write that waited on an older version than one seen can no longer land."""
    if key in leader.unsettled and seen > leader.unsettled[key]:
        del leader.unsettled[key]
