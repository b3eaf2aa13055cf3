"""Rollouts while watts are short: whoever served before serves again, and what was not there does not hold them up."""

from collections import Counter

import pytest
from tests.unit.controller.manifests import LLAMA_70B, Manifest, domain, factory, hall, model, profile, rack
from tests.unit.controller.small_agent import H100
from tests.unit.controller.small_world import OPTIONS, SmallWorld

from tokenfactory.api import names
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller import actions as act
from tokenfactory.controller.objects import Deployment
from tokenfactory.controller.plan.rolling import PATIENCE_SECONDS, _turn
from tokenfactory.controller.plan.world import see
from tokenfactory.kube.objects import Pod

AMPLE, SHORT = "12kW", "6kW"
"""Two nodes of eight GPUs: their minimum and 2 kW beside; what is left of the shorter one is far below four knees."""


def wanted(tag: str, replicas: int = 4) -> Manifest:
    return factory(model("m", tag=tag, gpus=2, replicas=(replicas, replicas)))


def serving(world: SmallWorld) -> Counter[str]:
    """Ready pods by their image's tag."""
    return Counter(map(tag_of, world.ready_pods()))


def condition(world: SmallWorld, kind: str) -> str:
    status = world.objects[TokenFactory]["inference", "chat"].status
    return next(each.status for each in status.conditions if each.type == kind)


def deployment(world: SmallWorld) -> Deployment:
    (found,) = world.objects[Deployment].values()
    return found


def squeezed(replicas: int = 4) -> SmallWorld:
    """Four replicas run, and then there are only watts to begin one or two."""
    world = SmallWorld.of(2, hall(AMPLE), wanted("1.8.0"))
    world.settle()
    assert serving(world) == {"1.8.0": 4}
    world.apply(hall(SHORT))
    world.settle()
    world.apply(wanted("1.8.0", replicas))
    world.settle()
    assert serving(world) == {"1.8.0": 4}
    return world


def test_a_new_replica_would_not_begin_with_so_few_watts():
    """Else there is nothing to be shown here."""
    world = SmallWorld.of(2, hall(SHORT), wanted("1.8.0"))
    world.settle()
    assert serving(world)["1.8.0"] < 4


@pytest.mark.parametrize("replicas", [4, 8], ids=["all run", "others wait"])
@pytest.mark.parametrize("writes", [None, 1, 2, 3])
def test_a_rollout_in_a_shortage_ends_with_as_many_as_ran_before(replicas: int, writes: int | None):
    """In peace, or while each third operator dies after so many writes."""
    world = squeezed(replicas)
    world.apply(wanted("1.9.0", replicas))
    for number in range(60):
        world.rounds(1)
        assert sum(serving(world).values()) >= 3, "a quarter at a time"
        if writes is not None and not number % 3:
            world.operate(writes)
            world.crash()
    world.settle()
    assert serving(world) == {"1.9.0": 4}
    assert condition(world, "Updated") == "True"
    assert names.RAN_LABEL not in deployment(world).metadata.labels
    assert deployment(world).spec["strategy"]["rollingUpdate"]["maxUnavailable"] == "25%"


def test_what_begins_a_rollout_says_how_many_ran_in_the_same_write():
    world = squeezed(8)
    world.apply(wanted("1.9.0", 8))
    writes = [each for each in world.plan().plan.actions if isinstance(each, act.ApplyWorkload)]
    assert [each.manifest["metadata"]["labels"][names.RAN_LABEL] for each in writes] == ["4"]
    strategy = writes[0].manifest["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxSurge": 0, "maxUnavailable": 5}


def test_who_is_patient_is_looked_for_when_its_patience_ends():
    """Nothing else would happen by then."""
    world = squeezed()
    world.apply(wanted("1.9.0"))
    world.rounds(2)
    assert serving(world) == {"1.8.0": 3}
    assert world.plan().plan.again_after_seconds <= PATIENCE_SECONDS


def two_racks(**limits: str) -> tuple[Manifest, ...]:
    return (hall("40kW"), *(rack(letter, limits.get(letter, "10kW")) for letter in "ab"))


def rolled(world: SmallWorld, *shortage: Manifest) -> set[str]:
    """Where the four are after a rollout in that shortage."""
    world.settle()
    assert serving(world) == {"1.8.0": 4}
    world.apply(*shortage)
    world.settle()
    factory_ = world.objects[TokenFactory]["inference", "chat"].spec
    world.apply(
        wanted("1.9.0") | {"spec": wanted("1.9.0")["spec"] | {"power": {"domain": factory_.power.domain}}}
    )
    world.settle(400)
    assert serving(world) == {"1.9.0": 4}
    assert names.RAN_LABEL not in deployment(world).metadata.labels
    return {pod.spec.node_name for pod in world.ready_pods()}


def test_a_successor_goes_where_the_lowest_caps_fit():
    """One rack is over its limit even at the lowest caps: to wait there would be to wait for ever."""
    world = SmallWorld()
    for letter in "ab":
        world.add_node(f"n-{letter}", rack=letter)
    world.apply(*two_racks(), wanted("1.8.0"))
    assert rolled(world, *two_racks(a="2.4kW", b="4.2kW")) == {"n-b"}


def test_a_successor_goes_where_a_grant_bears_it_at_the_lowest_caps():
    def granted(letter: str, budget: str | None) -> Manifest:
        admits = {
            "namespaceSelector": {"matchLabels": {"team": "inference"}},
            **({"budget": budget} if budget else {}),
        }
        where = {"matchLabels": {"hall": letter}}
        return domain(
            f"hall-{letter}", "30kW", parent="site", reserve="0%", nodeSelector=where, admits=[admits]
        )

    world = SmallWorld()
    for letter in "ab":
        world.add_node(f"n-{letter}", hall=letter)
    world.label_namespace("inference", team="inference")
    site = domain("site", "60kW", reserve="0%", nodeOverhead="1kW")
    spread = wanted("1.8.0") | {"spec": wanted("1.8.0")["spec"] | {"power": {"domain": "site"}}}
    world.apply(site, granted("a", None), granted("b", None), spread)
    assert rolled(world, granted("a", "450W"), granted("b", "3kW")) == {"n-b"}


def test_who_asks_for_no_watts_beyond_the_lowest_cap_still_needs_a_limit_that_holds():
    """No rollout: a model whose knee is at the lowest cap, and a rack that is over its limit."""

    def small(replicas: int) -> Manifest:
        return factory(model("m", image=LLAMA_70B, gpus=2, replicas=(replicas, replicas)))

    world = SmallWorld()
    for letter in "ab":
        world.add_node(f"n-{letter}", rack=letter)
    world.apply(*two_racks(), profile("p", H100, (1, "150W", "100"), (4, "200W", "150")), small(3))
    world.settle()
    world.apply(*two_racks(a="2.4kW"))
    world.settle()
    world.apply(small(4))
    world.settle()
    assert [pod.spec.node_name for pod in world.ready_pods()] == ["n-b"] * 4


def test_a_successor_that_is_not_bound_is_followed_in_its_place():
    """The label must not go before the last one is bound."""
    world = SmallWorld.of(3, hall("14kW"), wanted("1.8.0"))
    world.settle(200)
    world.apply(hall("8.4kW"))
    world.settle(200)
    world.apply(wanted("1.9.0"))
    while not world.refusing:
        world.others()
        composed = world.plan()
        world.memory = composed.memory
        begun = sum(
            tag_of(pod) == "1.9.0" and not pod.spec.scheduling_gates for pod in world.objects[Pod].values()
        )
        charged = [each for each in composed.plan.actions if isinstance(each, act.ChargeNode) and grows(each)]
        if begun == 3 and charged:
            world.refusing[charged[0].name] = "0/3 nodes: 1 node had a volume conflict"
        for action in composed.plan.actions:
            world.take(action)
    world.settle(200)
    assert serving(world) == {"1.9.0": 4}
    assert names.RAN_LABEL not in deployment(world).metadata.labels


def tag_of(pod: Pod) -> str:
    return pod.spec.containers[0].image.rsplit(":")[-1]


def grows(charge: act.ChargeNode) -> bool:
    return charge.held is not None and len(charge.spec.pods) > len(charge.held.spec.pods)


def test_half_a_group_that_is_charged_has_not_taken_the_place_of_its_other_half():
    def spanning(tag: str) -> Manifest:
        return factory(model("m", tag=tag, gpus=8, nodesPerReplica=2, replicas=(2, 2)))

    world = SmallWorld.of(4, hall("40kW"), spanning("1.8.0"))
    world.has_groups = True
    world.settle()
    world.apply(hall("12.5kW"))
    world.settle(200)
    assert serving(world) == {"1.8.0": 4}
    world.apply(spanning("1.9.0"))
    charged = 0
    while charged < 2:
        world.others()
        composed = world.plan()
        world.memory = composed.memory
        for action in composed.plan.actions:
            charged += isinstance(action, act.ChargeNode) and grows(action)
            if charged == 2:
                world.crash()
                break
            world.take(action)
    for _ in range(60):
        world.rounds(1)
    world.settle(300)
    assert serving(world) == {"1.9.0": 4}
    assert not [each for each in world.writes if isinstance(each, act.DeletePod)], "nothing began in vain"


def test_groups_keep_their_places_from_the_highest_number_down():
    """So their controller replaces them: one of a lower number would never let it go on."""
    world = SmallWorld.of(4, hall("40kW"), factory(model("m", gpus=8, nodesPerReplica=2, replicas=(2, 2))))
    world.has_groups = True
    world.settle()
    replicas = see(world.snapshot(), OPTIONS.workloads).replicas
    assert [each.group[-1] for each in sorted(replicas, key=_turn)] == ["1", "1", "0", "0"]
