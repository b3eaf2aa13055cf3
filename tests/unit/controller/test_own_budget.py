"""A factory's own ceiling holds while caps move: whoever reads which sheet when, and whatever dies meanwhile.

What counts is what the simulated agents have set on the GPUs that the factory's pods hold, not what the ledger thinks.
"""

from typing import Any

import msgspec
import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st
from tests.unit.controller import manifests, small_world
from tests.unit.controller.manifests import LLAMA_70B, Manifest, domain, model, rack
from tests.unit.controller.small_agent import Agent
from tests.unit.controller.small_world import SmallWorld
from tests.unit.controller.walking import walks

from tokenfactory.api import names
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.quantities import Milliwatts, parse_power_or_percent
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.kube.objects import Pod

NODES = {"a1": "a", "a2": "a", "b1": "b", "b2": "b"}
HALL_MILLIWATTS = 40_000_000


class LateWorld(SmallWorld):
    """Some agents are heard and hear nothing yet, and of some nothing but their heartbeat arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.deaf: set[str] = set()
        self.factory_of: dict[str, str] = {}
        """Whose each pod is, or was, by its UID."""
        self.bounds: dict[str, int] = {}
        """What each factory may draw where its budget was lowered below what was charged already."""

    def _ask(self, agent: Agent, node: GPUNode) -> None:
        if agent.name not in self.deaf:
            super()._ask(agent, node)

    def drawn_by(self, name: str) -> int:
        """Milliwatts that the GPUs of one factory's pods may draw: also of those that are gone from a dead node."""
        for pod in self.objects[Pod].values():
            self.factory_of[pod.metadata.uid or ""] = pod.metadata.labels.get(names.FACTORY_LABEL, "")
        total = 0
        for agent in self.agents.values():
            held = self.objects[GPUNode].get(("", agent.name))
            owners = {gpu.uuid: gpu.pod_uid for gpu in held.status.gpus} if held else {}
            holding = agent.holding(self.objects[Pod].values())
            owners |= {uuid: pod.metadata.uid or "" for uuid, pod in holding.items()}
            total += sum(
                limit
                for uuid, limit in agent.limits().items()
                if self.factory_of.get(owners.get(uuid, "")) == name
            )
        return total

    def budget_of(self, name: str) -> int | None:
        held = self.objects[TokenFactory].get(("inference", name))
        if held is None or held.spec.power.budget is None:
            return None
        return parse_power_or_percent(held.spec.power.budget, Milliwatts(HALL_MILLIWATTS))

    def charged_to(self, name: str) -> int:
        return self.plan().books.spending.charged[f"inference/{name}'s spec.power.budget"]

    def check(self) -> None:
        for name in ("chat", "search"):
            budget = self.budget_of(name)
            if budget is None:
                self.bounds.pop(name, None)
                continue
            bound = self.bounds.get(name, budget)
            if bound > budget:
                # What was on its way to the agents when the budget was lowered may still arrive.
                bound = self.bounds[name] = max(budget, min(bound, self.charged_to(name)))
            drawn = self.drawn_by(name)
            assert drawn <= bound, f"{name} may draw {drawn} mW of {bound} mW"

    def set_budget(self, manifest: Manifest) -> None:
        self.apply(manifest)
        name = manifest["metadata"]["name"]
        budget = self.budget_of(name)
        if budget is not None:
            self.bounds[name] = max(budget, self.charged_to(name))

    def turn(self) -> None:
        self.others()
        self.check()
        self.operate()
        self.check()


def chat(budget: str | None, *models: Manifest, name: str = "chat", where: str = "hall") -> Manifest:
    return manifests.factory(
        *models, name=name, power={"domain": where, **({"budget": budget} if budget else {})}
    )


def llama(
    name: str = "llama", band: int = 50, replicas: int = 1, value: str = "1", gpus: int = 4
) -> Manifest:
    return model(
        name,
        image=LLAMA_70B,
        gpus=gpus,
        band=band,
        replicas=(replicas, replicas),
        valuePerMillionTokens=value,
    )


def site() -> LateWorld:
    world = LateWorld()
    for name, where in NODES.items():
        world.add_node(name, rack=where)
    world.claim()
    world.apply(domain("hall", "40kW", reserve="0%", nodeOverhead="500W"))
    for letter in "ab":
        world.apply(rack(letter, "20kW", reserve="0%"))
    return world


models = st.lists(
    st.builds(
        llama,
        st.sampled_from(["one", "two", "three"]),
        band=st.sampled_from([50, 100]),
        replicas=st.integers(1, 2),
        value=st.sampled_from(["1", "3"]),
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda each: each["name"],
)
factory_names = st.sampled_from(["chat", "search"])
steps = st.one_of(
    st.tuples(
        st.just("apply"),
        st.sampled_from([None, "2kW", "3kW", "5kW", "8kW", "10%", "20%"]),
        models,
        factory_names,
        st.sampled_from(["hall", "rack-a"]),
    ),
    st.tuples(st.just("deaf"), st.sets(st.sampled_from(sorted(NODES)))),
    st.tuples(st.just("mute"), st.sampled_from(sorted(NODES)), st.booleans()),
    st.tuples(st.just("dead"), st.sampled_from(sorted(NODES)), st.booleans()),
    st.tuples(st.just("rack"), st.sampled_from("ab"), st.sampled_from(["4kW", "6kW", "20kW"])),
    st.tuples(st.just("move"), st.sampled_from(sorted(NODES)), st.sampled_from("ab")),
    st.tuples(st.just("crash")),
    st.tuples(st.just("rounds"), st.integers(1, 12)),
)


def take(world: LateWorld, step: tuple[Any, ...]) -> None:
    match step:
        case ("apply", budget, asked, name, where):
            if budget and budget.endswith("%"):
                where = "hall"
            world.set_budget(chat(budget, *asked, name=name, where=where))
        case ("deaf", who):
            world.deaf = set(who)
        case ("mute", who, on):
            world.agents[who].reports = not on
        case ("dead", who, on):
            world.agents[who].alive = not on
        case ("rack", letter, limit):
            world.apply(rack(letter, limit, reserve="0%"))
        case ("move", who, letter):
            world.label_node(who, rack=letter)
        case ("crash",):
            world.crash()
        case ("rounds", count):
            for _ in range(count):
                world.turn()


THE_OTHER_WAY_ROUND: list[tuple[Any, ...]] = [
    ("apply", "8kW", [llama("one", 100, 2), llama("two", 50, 2)], "chat", "hall"),
    ("rounds", 12),
    ("deaf", {"a1"}),
    ("apply", "8kW", [llama("one", 50, 2), llama("two", 100, 2)], "chat", "hall"),
    ("rounds", 12),
]
"""The agents of who is worth more now hear it, and those of who must fall do not."""


@walks(5)
@given(st.lists(steps, min_size=6, max_size=20))
@example(THE_OTHER_WAY_ROUND)
def test_no_walk_takes_a_factory_over_its_own_ceiling(walk: list[tuple[Any, ...]]):
    world = site()
    for step in walk:
        take(world, step)
        world.turn()
    world.deaf = set()
    for agent in world.agents.values():
        agent.reports = agent.alive = True
    world.settle(200, each_round=lambda _: world.check())
    event(f"{len(world.ready_pods())} serve")


def told(world: LateWorld, name: str = "chat") -> list[str]:
    return [entry.message for entry in world.objects[TokenFactory]["inference", name].status.waiting]


def serving(world: LateWorld, name: str = "chat") -> int:
    return sum(pod.metadata.labels[names.FACTORY_LABEL] == name for pod in world.ready_pods())


def caps_of(world: LateWorld, name: str) -> set[int]:
    """Watts that the GPUs of one factory's classes have read back."""
    found = set()
    for node in world.objects[GPUNode].values():
        owners = {grant.uid: names.class_owner(grant.class_name) for grant in node.spec.pods}
        for gpu in node.status.gpus:
            if (owners.get(gpu.pod_uid) or ("", ""))[1] == name:
                found.add(gpu.enforced_milliwatts // 1000)
    return found


def test_who_is_worth_more_rises_only_as_the_others_have_read_back_that_they_fall():
    world = site()
    world.set_budget(chat("8kW", llama("one", band=100, gpus=8), llama("two", gpus=8)))
    world.settle(each_round=lambda _: world.check())
    before = world.drawn_by("chat")
    assert before > 7_900_000
    world.set_budget(chat("8kW", llama("one", gpus=8), llama("two", band=100, gpus=8)))
    world.deaf = {node for node in NODES if _serves_one(world, node)}
    for _ in range(8):
        world.turn()
    waits = [str(wait) for wait in world.plan().books.waits]
    assert any("inference/chat's spec.power.budget has no watts left until" in wait for wait in waits)
    world.deaf = set()
    world.settle(each_round=lambda _: world.check())
    assert world.drawn_by("chat") == before
    assert not world.plan().books.waits


def _serves_one(world: LateWorld, node: str) -> bool:
    return any(grant.name.startswith("chat-one") for grant in world.objects[GPUNode]["", node].spec.pods)


def test_a_replica_that_the_budget_cannot_bear_at_the_lowest_cap_waits_and_squeezes_nobody():
    """Four GPUs at 200 W each are 800 W a replica: two fit into 2 kW, and have 250 W for each GPU."""
    world = site()
    world.set_budget(chat("2kW", llama(replicas=3)))
    world.settle(each_round=lambda _: world.check())
    assert serving(world) == 2
    assert caps_of(world, "chat") == {250}
    assert any(
        "inference/chat's spec.power.budget lacks 400W even with every GPU at its lowest cap" in message
        for message in told(world)
    )
    assert not world.plan().plan.actions
    world.set_budget(chat("3kW", llama(replicas=3)))
    world.settle(each_round=lambda _: world.check())
    assert serving(world) == 3


def test_a_budget_lowered_below_what_its_gpus_need_at_least_is_told_and_nothing_of_it_rises():
    world = site()
    world.set_budget(chat("8kW", llama(replicas=3)))
    world.settle(each_round=lambda _: world.check())
    world.set_budget(chat("2kW", llama(replicas=3), llama("two", band=100)))
    world.settle(each_round=lambda _: world.check())
    assert serving(world) == 3
    assert caps_of(world, "chat") == {200}
    within = {each.type: each for each in world.objects[TokenFactory]["inference", "chat"].status.conditions}
    assert (within["WithinBudget"].status, within["WithinBudget"].reason) == ("False", "OverBudget")
    assert not world.plan().plan.actions


def test_what_stands_outside_its_domain_counts_as_well():
    """Its pods outlived a factory of the same name elsewhere, or its domain was deleted."""
    world = site()
    world.set_budget(chat("4kW", llama(replicas=2), where="rack-a"))
    world.settle(each_round=lambda _: world.check())
    world.set_budget(chat("4kW", llama(replicas=2), llama("two"), where="rack-b"))
    for _ in range(30):
        world.turn()
    paths = [node.spec.path for node in world.objects[GPUNode].values() if node.spec.pods]
    assert {path[-1] for path in paths} == {"rack-a", "rack-b"}
    assert 3_900_000 < world.drawn_by("chat") <= 4_000_000
    world.set_budget(chat("4kW", llama(replicas=2), llama("two"), where="no-such-rack"))
    for _ in range(12):
        world.turn()
    assert world.drawn_by("chat") > 3_900_000


def test_what_a_dead_node_may_draw_is_not_there_for_the_others():
    world = site()
    world.set_budget(chat("5kW", llama(replicas=2)))
    world.settle(each_round=lambda _: world.check())
    dead = next(pod.spec.node_name for pod in world.ready_pods())
    world.agents[dead].alive = False
    for _ in range(60):
        world.turn()
    assert serving(world) == 2, "its replacement has what is left of the budget"
    assert world.drawn_by("chat") > 4_900_000


def test_a_node_that_moves_leaves_its_old_rack_once_the_budget_bears_what_it_may_draw_then():
    """Rack a holds its GPUs far below those of the same model in rack b, which give up watts before it comes to them."""
    world = site()
    for node in NODES:
        world.cordon(node, node != "a1")
    world.set_budget(chat("5.2kW", llama(replicas=2)))
    world.settle(each_round=lambda _: world.check())
    world.cordon("a1")
    world.cordon("b1", on=False)
    world.apply(rack("a", "5.2kW", reserve="0%"))
    world.set_budget(chat("5.2kW", llama(replicas=3)))
    world.settle(each_round=lambda _: world.check())
    low, high = sorted(caps_of(world, "chat"))
    assert low * 1.5 < high
    world.label_node("a1", rack="b")
    world.deaf = {"b1"}
    for _ in range(10):
        world.turn()
        assert world.charged_to("chat") <= 5_200_000, (
            "an agent may read that it has left before it reads a cut"
        )
    world.deaf = set()
    world.settle(each_round=lambda _: world.check())
    moved = world.objects[GPUNode]["", "a1"].spec
    assert (moved.path, moved.former_paths) == (("hall", "rack-b"), ())
    assert len(caps_of(world, "chat")) == 1
    assert world.drawn_by("chat") > 5_100_000


def test_of_a_group_that_the_budget_cannot_bear_no_half_begins():
    """Sixteen GPUs at 200 W each are 3.2 kW: of 2.5 kW one of the two nodes would serve nobody, again and again."""
    world = site()
    world.has_groups = True
    world.set_budget(chat("2.5kW", {**llama("wide", gpus=8), "nodesPerReplica": 2}))
    world.settle(each_round=lambda _: world.check())
    assert not any(node.spec.pods for node in world.objects[GPUNode].values())
    assert all("inference/chat's spec.power.budget lacks 700W" in message for message in told(world))
    assert len(told(world)) == 2
    world.set_budget(chat("4kW", {**llama("wide", gpus=8), "nodesPerReplica": 2}))
    world.settle(each_round=lambda _: world.check())
    assert serving(world) == 2


def test_who_waits_for_a_dead_nodes_watts_is_told_which_node_to_fence():
    world = site()
    world.set_budget(chat("2.8kW", llama()))
    world.settle(each_round=lambda _: world.check())
    dead = next(pod.spec.node_name for pod in world.ready_pods())
    world.agents[dead].alive = False
    for _ in range(60):
        world.turn()
    assert any(
        message.endswith(f"stay charged to silent nodes until these are fenced: {dead}")
        for message in told(world)
    )


def test_a_domain_that_is_gone_leaves_a_budget_in_watts_as_it_is():
    world = site()
    world.set_budget(chat("4kW", llama(replicas=2)))
    world.settle(each_round=lambda _: world.check())
    world.set_budget(chat("4kW", llama(replicas=2), where="no-such-hall"))
    for _ in range(12):
        world.turn()
    status = world.objects[TokenFactory]["inference", "chat"].status
    assert status.budget == "4kW"
    assert next(each for each in status.conditions if each.type == "WithinBudget").status == "True"


def test_where_strangers_may_land_a_replica_needs_what_its_gpus_draw_uncapped(
    monkeypatch: pytest.MonkeyPatch,
):
    """Four GPUs at 700 W each are 2.8 kW a replica there: one fits into 4 kW, whatever caps would do."""
    monkeypatch.setattr(
        small_world, "OPTIONS", msgspec.structs.replace(small_world.OPTIONS, taint_nodes=False)
    )
    world = site()
    world.set_budget(chat("4kW", llama(replicas=2)))
    world.settle(each_round=lambda _: world.check())
    assert serving(world) == 1
    assert world.charged_to("chat") <= 4_000_000
    assert not world.plan().books.waits
