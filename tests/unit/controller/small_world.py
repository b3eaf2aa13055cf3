"""A cluster in memory with our operator in it: enough to plan on, and to follow what a plan leads to.

It is no API server: it exists so that a plan's consequences can be followed for thousands of rounds in a second.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any, Self

import msgspec
from tests.unit.controller.manifests import Manifest
from tests.unit.controller.small_agent import H100, Agent
from tests.unit.controller.small_api import key_of
from tests.unit.controller.small_cluster import SmallCluster

from tokenfactory.api import names
from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.meta import ObjectMeta, OwnerReference
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.api.power_profile import PowerProfile
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller import actions as act
from tokenfactory.controller.compose import Composed, Options, compose
from tokenfactory.controller.objects import Deployment, LeaderWorkerSet, Service
from tokenfactory.controller.owning import Taken, in_words, whose
from tokenfactory.controller.plan.memory import Memory
from tokenfactory.controller.snapshot import Leadership, Snapshot
from tokenfactory.controller.workloads import WorkloadOptions
from tokenfactory.kube.objects import Namespace, Node, Pod, Taint
from tokenfactory.kube.volumes import PersistentVolume, PersistentVolumeClaim

__all__ = ["H100", "OPTIONS", "Agent", "SmallWorld"]
OPTIONS = Options(workloads=WorkloadOptions(image="tokenfactory:test"))


class SmallWorld(SmallCluster):
    def __init__(self, *, term: int = 1) -> None:
        super().__init__()
        self.term = term
        self.claim_from: int | None = None
        """None: nobody handed over to this leader."""
        self.writes: list[act.Action] = []
        self.events: list[tuple[str, str]] = []
        self.memory = Memory()
        self.taken = Taken()
        self.before_write: Callable[[act.Action], None] = lambda _: None

    @classmethod
    def of(cls, nodes: int, *manifests: Manifest) -> Self:
        """Nodes n0, n1 and so on, and what people have applied; nobody has acted yet."""
        world = cls()
        for number in range(nodes):
            world.add_node(f"n{number}")
        world.apply(*manifests)
        return world

    def fork(self) -> "SmallWorld":
        """A world that goes on from here by itself."""
        other = copy.copy(self)
        other.objects = {kind: dict(held) for kind, held in self.objects.items()}
        other.agents = {
            name: replace(agent, enforced=dict(agent.enforced)) for name, agent in self.agents.items()
        }
        other.writes, other.events = list(self.writes), list(self.events)
        other._drew = dict(self._drew)
        other.taken = copy.deepcopy(self.taken)
        return other

    def plan(self) -> Composed:
        return self.plan_of(self.snapshot())

    def plan_of(self, snapshot: Snapshot) -> Composed:
        return compose(snapshot, OPTIONS, self.memory)

    def operate(self, most_writes: int | None = None) -> int:
        """One round; dies after `most_writes`. Returns how many writes there were."""
        done = 0
        composed = self.plan()
        self.memory = composed.memory
        for action in composed.plan.actions:
            if most_writes is not None and done >= most_writes:
                break
            self.take(action)
            done += 1
        return done

    def crash(self) -> None:
        """The operator is killed, and another process leads: nothing is left of the first but what it wrote."""
        self.term += 1
        self.memory = Memory()
        self.taken = Taken()

    def snapshot(self) -> Snapshot:
        return Snapshot(
            leadership=Leadership(self.term, self.term if self.claim_from is None else self.claim_from),
            wall=self.now,
            milliseconds=self.milliseconds,
            domains=dict(self.objects[PowerDomain]),
            factories=dict(self.objects[TokenFactory]),
            profiles=dict(self.objects[PowerProfile]),
            sheets=dict(self.objects[CapSheet]),
            sheets_version=self.version,
            gpu_nodes=dict(self.objects[GPUNode]),
            nodes=dict(self.objects[Node]),
            pods=dict(self.objects[Pod]),
            deployments=self._labelled(Deployment),
            services=self._labelled(Service),
            taken=self.taken.at(self.milliseconds),
            leader_worker_sets=self._labelled(LeaderWorkerSet) if self.has_groups else None,
            namespaces=dict(self.objects[Namespace]),
            claims=dict(self.objects[PersistentVolumeClaim]),
            volumes=dict(self.objects[PersistentVolume]),
            silent_seconds={
                name: (self.now - agent.heard_at).total_seconds() for name, agent in self.agents.items()
            },
        )

    def _labelled(self, kind: type) -> dict[tuple[str, str], Any]:
        """All of a kind that the operator's caches hold."""
        return {
            key: held
            for key, held in self.objects[kind].items()
            if names.FACTORY_LABEL in held.metadata.labels
        }

    def take(self, action: act.Action) -> None:
        self.before_write(action)
        self.writes.append(action)
        match action:
            case act.PublishSheet(held, spec):
                current = self.objects[CapSheet].get(("", spec.domain))
                assert (current is None) == (held is None)
                if current is not None and held is not None:
                    assert current.metadata.resource_version == held.metadata.resource_version
                    assert spec.epoch > current.spec.epoch or spec.caps == current.spec.caps
                    assert spec.term >= current.spec.term
                self.put(CapSheet(metadata=ObjectMeta(name=spec.domain), spec=spec), new_generation=True)
            case act.ChargeNode(held, name, spec):
                node = held or GPUNode(metadata=ObjectMeta(name=name))
                self.put(msgspec.structs.replace(node, spec=spec), new_generation=True)
            case act.ApplyWorkload(kind, key, manifest):
                self._apply_workload(kind, key, manifest, action.held)
            case act.Retire(held):
                self.version += 1
                current = self.objects[type(held)].pop(key_of(held))
                assert current.metadata.resource_version == held.metadata.resource_version
            case act.DeleteWorkload(held):
                del self.objects[type(held)][key_of(held)]
            case act.OpenGate(pod, node):
                assert pod.spec.scheduling_gates
                self.schedule(pod, node)
            case act.DeletePod(pod):
                self.delete_pod(pod)
            case act.MarkPod(pod, cost):
                meta = self.objects[Pod][key_of(pod)].metadata
                meta = msgspec.structs.replace(
                    meta, annotations={**meta.annotations, names.DELETION_COST: cost}
                )
                self.put(msgspec.structs.replace(self.objects[Pod][key_of(pod)], metadata=meta))
            case act.TaintNode(node, _, taints):
                held = self.objects[Node][("", node)]
                spec = msgspec.structs.replace(
                    held.spec, taints=tuple(msgspec.convert(dict(taint), type=Taint) for taint in taints)
                )
                self.put(msgspec.structs.replace(held, spec=spec))
            case _:
                self._note(action)

    def _apply_workload(
        self, kind: type, key: tuple[str, str], manifest: Mapping[str, Any], held: Any
    ) -> None:
        """As the actor does it: never over somebody else's object."""
        old, meta = self.objects[kind].get(key), manifest["metadata"]
        owners = tuple(msgspec.convert(owner, OwnerReference) for owner in meta["ownerReferences"])
        if old is not None and whose(old.metadata, owners[0].name, owners[0].uid) == "Others":
            assert held is None, "it is known to be somebody else's"
            self.taken.note(
                (kind.KIND, key), in_words(kind.KIND, old.metadata, owners[0].name), self.milliseconds
            )
            return
        self.taken.free((kind.KIND, key))
        made = ObjectMeta(
            name=key[1],
            namespace=key[0],
            uid=old.metadata.uid if old else f"uid-{key[1]}-{self.version + 1}",
            labels=meta["labels"],
            owner_references=owners,
            generation=old.metadata.generation if old else 0,
        )
        self.put(kind(metadata=made, spec=manifest["spec"]), new_generation=True)

    def _note(self, action: act.Action) -> None:
        """What is only told or written down."""
        match action:
            case act.RecordProfile(name, spec):
                assert ("", name) not in self.objects[PowerProfile]
                meta = ObjectMeta(name=name, labels={names.LEARNED_LABEL: "true"})
                self.put(PowerProfile(metadata=meta, spec=spec), new_generation=True)
            case act.WriteStatus(held, status):
                current = self.objects[type(held)][key_of(held)]
                self.put(msgspec.structs.replace(current, status=status))
            case act.Tell(_, reason, message):
                self.events.append((reason, message))

    def rounds(self, count: int) -> None:
        """Everybody else and then the operator, so many times."""
        for _ in range(count):
            self.others()
            self.operate()

    def live(self, seconds: float) -> None:
        until = self.now + timedelta(seconds=seconds)
        while self.now < until:
            self.rounds(1)

    def settle(
        self, most_rounds: int = 80, each_round: Callable[["SmallWorld"], None] = lambda _: None
    ) -> int:
        """Rounds until the operator has nothing to write any more, however patient it is."""
        patience = [11, 31, 301]
        for number in range(most_rounds):
            self.others()
            each_round(self)
            writes = self.operate()
            each_round(self)
            if writes:
                patience = [11, 31, 301]
            elif not patience:
                return number
            else:
                self.now += timedelta(seconds=patience.pop(0))
        left = [str(action)[:200] for action in self.plan().plan.actions]
        raise AssertionError(f"not settled after {most_rounds} rounds; the operator still wants: {left}")
