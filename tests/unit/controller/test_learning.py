"""What saturated replicas make becomes knowledge: written down seldom, a person's profile untouched, used when sure."""

from datetime import timedelta

import msgspec
import pytest
from tests.unit.controller.manifests import LLAMA_70B, Manifest, factory, hall, model, profile
from tests.unit.controller.small_world import H100, OPTIONS, Agent, SmallWorld

from tokenfactory.api import names
from tokenfactory.api.gpu_node import PodMeter
from tokenfactory.api.power_profile import PowerProfile
from tokenfactory.controller import actions as act
from tokenfactory.controller.plan.hulls import model_hull
from tokenfactory.controller.plan.memory import Memory
from tokenfactory.controller.plan.profiles import learned_of
from tokenfactory.controller.plan.world import see
from tokenfactory.kube.objects import Pod

LLAMA = model(image=LLAMA_70B, replicas=(4, 4))


class Serving:
    """Meters of replicas that make as much as a hidden curve says, if requests wait."""

    def __init__(self, world: SmallWorld, *, queued: int = 5) -> None:
        self.world, self.queued = world, queued
        self.tokens: dict[str, int] = {}

    def rate(self, cap: int) -> float:
        """Per GPU: flat down to 450 W, then a cliff."""
        return 500.0 * max(1 - 1.8 * max(450_000 - cap, 0) / 450_000, 0.05)

    def __call__(self, agent: Agent, holding: dict[str, Pod]) -> tuple[PodMeter, ...]:
        found = {}
        for uuid, pod in holding.items():
            uid = pod.metadata.uid or ""
            rate = 4 * self.rate(agent.enforced.get(uuid, 700_000)) * (1.0 if self.queued else 0.2)
            if uid not in found:
                self.tokens[uid] = self.tokens.get(uid, 0) + round(rate * 2)
            found[uid] = PodMeter(
                pod=f"{pod.metadata.namespace}/{pod.metadata.name}",
                uid=uid,
                since="2026-11-21T12:00:00Z",
                generated_tokens=self.tokens[uid],
                running=256,
                queued=self.queued,
                tokens_per_kilosecond=round(rate * 1000),
                inter_token_latency_us=round(64e6 / rate),
            )
        return tuple(found.values())


def limited(kilowatts: int) -> Manifest:
    return hall(f"{kilowatts}kW", reserve="0%")


def site() -> SmallWorld:
    return SmallWorld.of(2, limited(15), factory(LLAMA))


@pytest.fixture
def world() -> SmallWorld:
    return site()


@pytest.fixture(scope="module")
def walked() -> SmallWorld:
    """After limits over some days: the caps have visited most of the range."""
    world = site()
    world.meters = Serving(world)
    live(world, 20)
    for limit in (14, 13, 12, 11, 10, 9, 8, 7, 6):
        world.apply(limited(limit))
        live(world, 13)
    return world


def live(world: SmallWorld, minutes: float) -> list[act.Action]:
    """Six looks a minute are enough; what was written about profiles comes back."""
    since = len(world.writes)
    until = world.now + timedelta(minutes=minutes)
    while world.now < until:
        world.others()
        world.now += timedelta(seconds=8)
        world.operate()
    return [
        each
        for each in world.writes[since:]
        if isinstance(each, act.RecordProfile)
        or (isinstance(each, act.WriteStatus) and isinstance(each.held, PowerProfile))
    ]


def known(world: SmallWorld) -> PowerProfile:
    (found,) = world.objects[PowerProfile].values()
    return found


def test_nothing_is_written_of_replicas_that_could_have_made_more(world: SmallWorld):
    world.meters = Serving(world, queued=0)
    assert live(world, 20) == []
    assert world.objects[PowerProfile] == {}


def test_what_is_learned_is_written_once_and_a_settled_factory_writes_no_more(world: SmallWorld):
    world.meters = Serving(world)
    written = live(world, 20)
    assert [type(each).__name__ for each in written] == ["RecordProfile", "WriteStatus"]
    made = known(world)
    assert made.metadata.labels == {names.LEARNED_LABEL: "true"}
    assert made.spec.model == "nvcr.io/nim/meta/llama-3.3-70b-instruct"
    assert (made.spec.gpu_product, made.spec.gpus_per_replica) == (H100, 4)
    assert [float(point.tokens_per_second) for point in made.status.learned] == pytest.approx([500], rel=0.01)
    assert made.status.learned[0].concurrency == 256
    assert made.status.samples >= 10
    assert live(world, 60) == []


def test_learning_goes_on_with_the_caps_and_is_used_once_it_is_sure(walked: SmallWorld):
    world = walked.fork()
    model = world.snapshot().factories["inference", "chat"].spec.models[0]
    told = known(world)
    assert float(told.status.confidence) >= 0.5
    sure = model_hull(see(world.snapshot(), OPTIONS.workloads), "inference", model, H100, 200_000, 700_000)
    assert sure.tokens[-1] == pytest.approx(500, rel=0.1)
    assert sure.milliwatts[sure.knee] == pytest.approx(450_000, rel=0.1)
    world.put(msgspec.structs.replace(told, status=msgspec.structs.replace(told.status, confidence="0.49")))
    unsure = model_hull(see(world.snapshot(), OPTIONS.workloads), "inference", model, H100, 200_000, 700_000)
    world.objects[PowerProfile].clear()
    assert (
        unsure
        == model_hull(see(world.snapshot(), OPTIONS.workloads), "inference", model, H100, 200_000, 700_000)
        != sure
    )


def test_a_persons_profile_that_is_named_keeps_its_spec_and_learns_in_its_status(world: SmallWorld):
    world.apply(factory({**LLAMA, "powerProfile": "ours"}))
    world.apply(profile("ours", H100, (256, "250W", "300"), (256, "700W", "1200"), gpusPerReplica=4))
    spec = known(world).spec
    world.meters = Serving(world)
    written = live(world, 20)
    assert [type(each).__name__ for each in written] == ["WriteStatus"]
    assert known(world).spec == spec
    assert known(world).status.learned
    assert names.LEARNED_LABEL not in known(world).metadata.labels


def test_a_persons_profile_that_only_fits_is_begun_from_and_learns_nothing_of_a_tenant(world: SmallWorld):
    world.apply(profile("ours", H100, (256, "250W", "300"), (256, "700W", "1200"), gpusPerReplica=4))
    world.meters = Serving(world)
    live(world, 20)
    ours = world.objects[PowerProfile]["", "ours"]
    assert ours.status.learned == ()
    (made,) = (each for each in world.objects[PowerProfile].values() if each is not ours)
    assert [point.watts for point in made.spec.points] == ["250W", "700W"]
    assert made.status.learned


def test_what_one_namespace_measures_moves_no_cap_of_another(walked: SmallWorld):
    world = see(walked.snapshot(), OPTIONS.workloads)
    model = walked.snapshot().factories["inference", "chat"].spec.models[0]
    assert learned_of(world, "inference", model, H100) is not None
    assert learned_of(world, "research", model, H100) is None
    told = model_hull(world, "inference", model, H100, 200_000, 700_000)
    assert model_hull(world, "research", model, H100, 200_000, 700_000) != told
    named = msgspec.structs.replace(model, power_profile=known(walked).metadata.name)
    assert model_hull(world, "research", named, H100, 200_000, 700_000) == told


def test_a_model_that_names_a_profile_which_is_not_there_has_what_was_learned_written_once(world: SmallWorld):
    world.apply(factory({**LLAMA, "powerProfile": "no-such-profile"}))
    world.meters = Serving(world)
    assert [type(each).__name__ for each in live(world, 20)] == ["RecordProfile"]


def test_replicas_of_another_size_have_a_learned_profile_of_their_own(walked: SmallWorld):
    world = walked.fork()
    made = known(world)
    model = world.snapshot().factories["inference", "chat"].spec.models[0]
    wider = msgspec.structs.replace(model, gpus_per_replica=8)
    assert learned_of(see(world.snapshot(), OPTIONS.workloads), "inference", model, H100) == made
    assert learned_of(see(world.snapshot(), OPTIONS.workloads), "inference", wider, H100) is None


@pytest.mark.parametrize("said", ["yesterday", "2026-11-21T12:00:00"])
def test_a_time_that_is_none_in_a_status_stops_no_plan(walked: SmallWorld, said: str):
    world = walked.fork()
    told = known(world)
    status = msgspec.structs.replace(told.status, updated_at=said, confidence="0.1")
    world.put(msgspec.structs.replace(told, status=status))
    live(world, 5)
    assert known(world).status.updated_at != said


def test_a_restarted_operator_recalls_what_it_wrote(walked: SmallWorld):
    world = walked.fork()
    before = known(world).status
    world.term += 1
    world.memory = Memory()
    live(world, 15)
    after = known(world).status
    assert float(after.confidence) >= float(before.confidence) - 0.1
    assert after.samples >= before.samples
    assert {p.watts for p in after.learned} >= {p.watts for p in before.learned}


def test_a_cap_that_has_just_moved_teaches_nothing(world: SmallWorld):
    world.meters = Serving(world)
    live(world, 5)
    before = world.memory.lessons
    assert before.known
    (subject,) = before.known
    world.apply(limited(9))
    samples = before.known[subject].samples
    live(world, 1.1)
    assert world.memory.lessons.known[subject].samples <= samples + 1
