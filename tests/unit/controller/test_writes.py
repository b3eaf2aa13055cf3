"""What a site costs the API server: nothing while it is settled, and little while figures move."""

import math
import random
from datetime import timedelta
from typing import Any

import msgspec
from tests.unit.controller.manifests import LLAMA_8B, factory, hall, model
from tests.unit.controller.small_world import SmallWorld

from tokenfactory.api.gpu_node import GPUNode, PodMeter
from tokenfactory.api.meta import Condition, ObjectMeta
from tokenfactory.api.power_domain import PowerDomain, PowerDomainStatus
from tokenfactory.controller import actions as act
from tokenfactory.controller.actor import Actor
from tokenfactory.kube.apply import Refused, Unchanged, Written
from tokenfactory.kube.objects import Pod

EVERY_SECONDS = 10


class Hour:
    """Two replicas under a steady load, as agents report it anew every ten seconds."""

    def __init__(self, noise: float) -> None:
        slo = {"timeToFirstToken": "1s", "interTokenLatency": "500ms"}
        llama = model(image=LLAMA_8B, gpus=2, replicas=(2, 4), slo=slo)
        wanted = {"tokensPerJoule": "0.1", "scope": "GPU"}
        self.world = SmallWorld.of(2, hall("60kW"), factory(llama, efficiency=wanted))
        self.world.settle()
        self.noise = random.Random(1)
        self.by = noise
        self.served = 0

    def report(self) -> None:
        self.served += 1
        for agent in self.world.agents.values():
            agent.heard_at = self.world.now
        nodes: dict[str, list[PodMeter]] = {}
        for pod in self.world.ready_pods():
            part = 1 + self.noise.uniform(-self.by, self.by)
            meter = PodMeter(
                pod=pod.metadata.name,
                uid=pod.metadata.uid or "",
                since="a",
                generated_tokens=self.served * 10_000,
                millijoules=self.served * 10_000_000,
                running=32,
                time_to_first_token_ms=int(300 * part),
                inter_token_latency_us=int(100_000 * part),
                tokens_per_kilosecond=int(1_000_000 * part),
            )
            nodes.setdefault(pod.spec.node_name, []).append(meter)
        for name, meters in nodes.items():
            node = self.world.objects[GPUNode]["", name]
            status = msgspec.structs.replace(
                node.status,
                meters=tuple(meters),
                draw_milliwatts=int(3_000_000 * (1 + self.noise.uniform(-self.by, self.by))),
            )
            self.world.put(msgspec.structs.replace(node, status=status))

    def pass_by(self, seconds: int) -> list[act.Action]:
        begin = len(self.world.writes)
        for _ in range(0, seconds, EVERY_SECONDS):
            self.world.now += timedelta(seconds=EVERY_SECONDS)
            self.report()
            self.world.operate()
        return self.world.writes[begin:]


def test_a_settled_site_costs_no_write_in_an_hour():
    """Its Lease and the renewals of its sheets are written elsewhere."""
    hour = Hour(noise=0.02)
    hour.pass_by(900)
    written = hour.pass_by(3600)
    assert [str(each)[:150] for each in written] == []


def test_figures_that_move_are_told_and_nothing_else_is_written():
    hour = Hour(noise=0.3)
    hour.pass_by(900)
    written = hour.pass_by(900)
    assert written
    assert all(isinstance(each, act.WriteStatus) and not each.urgent for each in written)


class Counting:
    """Counts what would go to the API server."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.now = 0.0

    async def status(self, held: Any, _: Any) -> Written[Any]:
        self.at.append(self.now)
        return Written(held)


async def test_a_status_is_written_every_ten_seconds_at_most_unless_a_condition_changes():
    server = Counting()
    actor = Actor(None, None, lambda: None, clock=lambda: server.now)  # type: ignore[arg-type]
    actor.writer = server  # type: ignore[assignment]
    held = PowerDomain(
        metadata=ObjectMeta(name="hall"), spec=msgspec.convert({"limit": "1kW"}, type_of_spec())
    )
    condition = Condition(type="Compliant", status="False", reason="OverCharged")
    for tenth in range(600):
        server.now = tenth / 10
        urgent = tenth in {205, 206}
        status = PowerDomainStatus(draw=f"{tenth}W", conditions=(condition,) if urgent else ())
        await actor.execute([act.WriteStatus(held, status, urgent=urgent)])
    assert server.at == [0.0, 10.0, 20.0, 20.5, 20.6, 30.6, 40.6, 50.6]


async def test_what_is_held_back_is_due_when_the_last_of_it_may_be_written():
    """One round for all of 600 racks, not one for each."""
    server = Counting()
    actor = Actor(None, None, lambda: None, clock=lambda: server.now)  # type: ignore[arg-type]
    actor.writer = server  # type: ignore[assignment]
    spec = msgspec.convert({"limit": "1kW"}, type_of_spec())
    one, other = (PowerDomain(metadata=ObjectMeta(name=name), spec=spec) for name in ("hall", "rack"))

    async def tell(*domains: PowerDomain) -> float:
        draw = PowerDomainStatus(draw=f"{server.now}W")
        actor.begin_round()
        await actor.execute([act.WriteStatus(each, draw) for each in domains])
        return actor.seconds_to_status

    assert await tell(one) == math.inf
    server.now = 4.0
    assert await tell(one, other) == 6.0
    server.now = 5.0
    assert await tell(one, other) == 9.0
    await actor.execute([])
    assert actor.seconds_to_status == 9.0, "a cut beside the round"
    server.now = 6.0
    assert await tell() == math.inf, "nothing waits any more"
    server.now = 11.0
    assert await tell(one, other) == 3.0
    server.now = 14.0
    assert await tell(other) == math.inf
    assert server.at == [0.0, 4.0, 11.0, 14.0]


def type_of_spec() -> Any:
    return next(field.type for field in msgspec.structs.fields(PowerDomain) if field.name == "spec")


class Deleting:
    """An API server that deletes whatever it is asked to, or says that it is another one by now."""

    def __init__(self, answer: Unchanged | Refused) -> None:
        self.answer = answer
        self.told: list[tuple[str, str]] = []

    async def delete(self, *_: Any, **__: Any) -> Unchanged | Refused:
        return self.answer

    def event(self, about: Any, reason: str, message: str, **_: Any) -> None:
        self.told.append((reason, message))


async def test_a_pod_that_is_replaced_is_told_why_and_counts_as_a_write():
    pod = Pod(metadata=ObjectMeta(name="chat-1", namespace="a", uid="1"))
    server = Deleting(Unchanged())
    actor = Actor(None, server, lambda: None)  # type: ignore[arg-type]
    actor.writer = server  # type: ignore[assignment]
    assert await actor.execute([act.DeletePod(pod, "its node is lost")])
    assert (actor.writes, server.told) == (1, [("Replaced", "its node is lost")])
    server.answer = Refused("it is another pod by now")
    assert not await actor.execute([act.DeletePod(pod, "its node is lost")])
    assert (actor.writes, len(server.told)) == (1, 1)
