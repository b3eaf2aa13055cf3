"""How long the controller's plan takes over a large site: settled, after one acknowledgement, after a cut.

Everything is built in memory as API objects and driven by the plans themselves until nothing is left to write, so the
state is one that the operator made. Agents obey at once and report what they obey. Nothing here talks to a server.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.unit.controller.manifests import Manifest, domain, factory, model
from tests.unit.controller.small_world import H100, SmallWorld

from _report import Report, quick
from tokenfactory.api import names
from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.gpu_node import AppliedEpoch, GPUNode, GPUNodeStatus, GPUStatus, PodMeter
from tokenfactory.controller import actions as act
from tokenfactory.controller.compose import Composed
from tokenfactory.kube.objects import Pod

GPUS = 8
RACK = 8
HALL = 64
"""Racks of a hall."""
REPEATS = 3 if quick() else 7


class LargeWorld(SmallWorld):
    """A site of many halls and racks. Only agents with something new to obey are asked."""

    def __init__(self, nodes: int, pods: int) -> None:
        super().__init__()
        racks = -(-nodes // RACK)
        halls = -(-racks // HALL)
        self.apply(_domain("site", nodes * 7_000))
        for hall in range(halls):
            self.apply(_domain(f"hall-{hall}", HALL * RACK * 8_000, "site"))
        for rack in range(racks):
            self.apply(_domain(f"rack-{rack}", RACK * 8_500, f"hall-{rack // HALL}", f"rack-{rack}"))
        for number in range(nodes):
            self.add_node(f"n{number:05}", GPUS, rack=f"rack-{number // RACK}")
        factories, models = 5, 4
        each = pods // (factories * models)
        for number in range(factories):
            self.apply(_factory(number, models, each))
        self.racks = racks

    def beat(self) -> None:
        sheets = {sheet.spec.domain: sheet.spec for sheet in self.objects[CapSheet].values()}
        caps = {name: {cap.class_name: cap.cap for cap in spec.caps} for name, spec in sheets.items()}
        pods: dict[str, list[Pod]] = defaultdict(list)
        for pod in self.objects[Pod].values():
            if pod.spec.node_name:
                pods[pod.spec.node_name].append(pod)
        for node in list(self.objects[GPUNode].values()):
            name = node.metadata.name
            self.agents[name].heard_at = self.now
            applied = tuple(
                AppliedEpoch(domain=d, epoch=sheets[d].epoch) for d in sorted(node.spec.path) if d in sheets
            )
            if (
                node.status.applied == applied
                and node.status.observed_generation == node.metadata.generation
                and len(node.status.meters) == len(pods[name])
            ):
                continue
            self.put(msgspec.structs.replace(node, status=_status(node, pods[name], caps, applied)))

    def acknowledge(self, name: str) -> None:
        """One agent reports anew."""
        node = self.objects[GPUNode]["", name]
        status = msgspec.structs.replace(node.status, draw_milliwatts=node.status.draw_milliwatts + 1000)
        self.put(msgspec.structs.replace(node, status=status))


def _status(node: GPUNode, pods: list[Pod], caps: dict, applied: tuple[AppliedEpoch, ...]) -> GPUNodeStatus:
    grants = {grant.uid: grant for grant in node.spec.pods}
    holders: list[Pod | None] = []
    for pod in sorted(pods, key=lambda pod: pod.metadata.name):
        holders += [pod] * int(pod.spec.containers[0].resources.limits[names.GPU_RESOURCE])
    holders += [None] * (GPUS - len(holders))
    gpus = []
    for index, pod in enumerate(holders):
        uid = (pod.metadata.uid or "") if pod else ""
        label = grants[uid].class_name if uid in grants else names.idle_class(H100)
        cap = min((caps[entry.domain].get(label, 0) for entry in applied), default=0)
        cap = max(200_000, min(700_000, cap))
        gpus.append(
            GPUStatus(
                index=index,
                uuid=f"{node.metadata.name}-gpu-{index}",
                product=H100,
                min_milliwatts=200_000,
                max_milliwatts=700_000,
                default_milliwatts=700_000,
                enforced_milliwatts=cap,
                class_name=label,
                pod=f"{pod.metadata.namespace}/{pod.metadata.name}" if pod else "",
                pod_uid=uid,
            )
        )
    meters = tuple(
        PodMeter(
            pod=f"{pod.metadata.namespace}/{pod.metadata.name}",
            uid=pod.metadata.uid or "",
            generated_tokens=10**6,
            millijoules=10**6,
            running=64,
            tokens_per_kilosecond=2_000_000,
        )
        for pod in pods
    )
    return GPUNodeStatus(
        observed_generation=node.metadata.generation,
        boot_id="boot-1",
        capped=True,
        mode="Obeying",
        applied=applied,
        gpus=tuple(gpus),
        draw_milliwatts=sum(gpu.enforced_milliwatts for gpu in gpus),
        meters=meters,
    )


def _domain(name: str, watts: int, parent: str | None = None, rack: str | None = None) -> Manifest:
    nodes = {"matchLabels": {"rack": rack}} if rack else None
    return domain(name, f"{watts}W", nodeOverhead="1500W", parent=parent, nodeSelector=nodes)


def _factory(number: int, models: int, replicas: int) -> Manifest:
    sizes = zip(range(models), (70, 8, 70, 8), (8, 2, 4, 1), strict=True)
    serve = [
        model(
            f"m{index}",
            image=f"llama-3.1-{size}b-instruct",
            gpus=gpus,
            replicas=(replicas, replicas),
            band=100 - 10 * (index % 2),
        )
        for index, size, gpus in sizes
    ]
    return factory(*serve, name=f"f{number}", power={"domain": "site"})


def _round(world: LargeWorld) -> tuple[float, Composed]:
    snapshot = world.snapshot()
    begin = time.perf_counter()
    composed = world.plan_of(snapshot)
    return time.perf_counter() - begin, composed


def measure(report: Report, nodes: int, pods: int, goal: float) -> None:
    world = LargeWorld(nodes, pods)
    begin, cold = time.perf_counter(), 0.0
    rounds = 0
    for rounds in range(1, 60):
        world.others()
        took, composed = _round(world)
        cold = max(cold, took)
        world.memory = composed.memory
        for action in composed.plan.actions:
            world.take(action)
        if not composed.plan.actions and rounds > 3:
            break
    came_up = time.perf_counter() - begin
    left = [type(action).__name__ for action in world.plan().plan.actions]
    if left:
        raise SystemExit(f"not settled after {rounds} rounds: {len(left)} actions left, such as {left[:5]}")
    running = len(world.ready_pods())
    print(f"{nodes} nodes, {running} of {pods} pods serve after {rounds} rounds in {came_up:.1f} s")
    label = f"{nodes}_nodes_{pods}_pods"
    settled = min(_round(world)[0] for _ in range(REPEATS))
    report.add(f"settled_round_{label}", settled, "s", f"<= {goal}")
    after = []
    for number in range(REPEATS):
        world.acknowledge(f"n{number:05}")
        took, composed = _round(world)
        world.memory = composed.memory
        after.append(took)
    report.add(f"round_after_one_acknowledgement_{label}", min(after), "s", f"<= {goal}")
    world.apply(_domain("site", nodes * 3_500))
    cut, composed = _round(world)
    writes = sum(isinstance(action, act.PublishSheet) for action in composed.plan.actions)
    report.add(f"round_of_a_cut_{label}", cut, "s")
    report.add(f"sheets_of_a_cut_{label}", writes, "count")
    report.add(f"slowest_round_to_first_tokens_{label}", cold, "s")


def main() -> int:
    report = Report("controller", 0)
    measure(report, 1_000, 500, 0.25)
    measure(report, 5_000, 2_500, 1.0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report.add("peak_rss", peak, "MB", "<= 600")
    return report.show()


if __name__ == "__main__":
    sys.exit(main())
