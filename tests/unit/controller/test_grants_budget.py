"""What a domain grants to a team: its factories together draw no more there, and elsewhere as much as they like."""

from dataclasses import replace
from datetime import timedelta

import pytest
from tests.unit.controller import manifests
from tests.unit.controller.manifests import LLAMA_70B, Manifest, domain, model
from tests.unit.controller.small_world import SmallWorld

from tokenfactory.api import names
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller.snapshot import Snapshot

GRANT = "hall-a's spec.admits[0]"


def hall(name: str, budget: str | None = None) -> Manifest:
    admits: list[Manifest] = [
        {"namespaceSelector": {"matchLabels": {"team": team}}} for team in ("inference", "others")
    ]
    if budget is not None:
        admits[0]["budget"] = budget
    nodes = {"matchLabels": {"hall": name}}
    return domain(f"hall-{name}", "30kW", parent="site", reserve="0%", nodeSelector=nodes, admits=admits)


def factory(name: str, namespace: str = "inference", where: str = "hall-a", replicas: int = 2) -> Manifest:
    slo = {"interTokenLatency": "50ms"}
    llama = model(image=LLAMA_70B, band=100, slo=slo, replicas=(replicas, replicas))
    return manifests.factory(llama, name=name, namespace=namespace, power={"domain": where})


@pytest.fixture
def world() -> SmallWorld:
    world = SmallWorld()
    for letter in "ab":
        for number in range(2):
            world.add_node(f"{letter}{number}", hall=letter)
    world.label_namespace("inference", team="inference")
    world.label_namespace("research", team="inference")
    world.label_namespace("guests", team="others")
    world.apply(domain("site", "60kW", reserve="0%", nodeOverhead="1kW"), hall("b"))
    return world


def charged(world: SmallWorld, letter: str, *namespaces: str) -> int:
    """Milliwatts that the GPUs of these namespaces' classes read back in one hall."""
    total = 0
    for (_, name), node in world.objects[GPUNode].items():
        for gpu in node.status.gpus if name.startswith(letter) else ():
            grant = next((pod for pod in node.spec.pods if pod.uid == gpu.pod_uid), None)
            owner = names.class_owner(grant.class_name) if grant else None
            total += gpu.enforced_milliwatts if owner and owner[0] in namespaces else 0
    return total


def serving(world: SmallWorld, namespace: str) -> int:
    return sum(pod.metadata.namespace == namespace for pod in world.ready_pods())


def status(world: SmallWorld, namespace: str, name: str):
    return world.objects[TokenFactory][namespace, name].status


def condition(world: SmallWorld, namespace: str, name: str, kind: str):
    return next(each for each in status(world, namespace, name).conditions if each.type == kind)


def live(world: SmallWorld, seconds: int, budget: int | None = None) -> None:
    until = world.now + timedelta(seconds=seconds)
    while world.now < until:
        world.others()
        world.operate()
        assert not world.new_breaches()
        if budget is not None:
            assert charged(world, "a", "inference", "research") <= budget


def test_the_factories_of_a_grant_share_its_watts_in_its_domain_and_others_do_not_pay(world: SmallWorld):
    world.apply(hall("a", "4kW"))
    world.apply(factory("chat", replicas=1))
    world.apply(factory("search", "research", replicas=1))
    world.apply(factory("free", "guests", replicas=1))
    world.apply(factory("away", where="hall-b", replicas=1))
    live(world, 120, budget=4_000_000)
    assert serving(world, "inference") == 2
    assert serving(world, "research") == serving(world, "guests") == 1
    together = charged(world, "a", "inference", "research")
    assert 3_900_000 <= together <= 4_000_000
    assert charged(world, "a", "guests") > together * 0.55
    assert charged(world, "b", "inference") == charged(world, "a", "guests")
    for namespace, name in (("inference", "chat"), ("research", "search")):
        assert GRANT in status(world, namespace, name).models[0].bound_by
    assert GRANT not in status(world, "guests", "free").models[0].bound_by
    assert GRANT not in status(world, "inference", "away").models[0].bound_by
    world.settle()


def test_a_factory_that_cannot_be_read_still_pays_from_its_grant(
    world: SmallWorld, monkeypatch: pytest.MonkeyPatch
):
    world.apply(hall("a", "4kW"))
    world.apply(factory("chat", replicas=1))
    world.apply(factory("search", "research", replicas=1))
    live(world, 120, budget=4_000_000)
    key, whole = ("inference", "chat"), world.snapshot

    def unread() -> Snapshot:
        seen = whole()
        rest = {each: held for each, held in seen.factories.items() if each != key}
        return replace(seen, factories=rest, undecodable={(TokenFactory.KIND, key): "of a newer version"})

    monkeypatch.setattr(world, "snapshot", unread)
    world.crash()
    live(world, 400, budget=4_000_000)
    assert charged(world, "a", "inference") >= 4 * 200_000


def test_a_newcomer_is_charged_only_once_the_others_have_given_up_watts_for_it(world: SmallWorld):
    world.apply(hall("a", "3.2kW"))
    world.apply(factory("chat", replicas=1))
    live(world, 60)
    assert charged(world, "a", "inference") > 3_200_000 - 4 * 200_000
    world.apply(factory("search", "research", replicas=1))
    until = world.now + timedelta(seconds=60)
    while world.now < until:
        world.others()
        world.operate()
        spent = world.plan().books.spending
        assert spent.charged[GRANT] <= spent.budgets.allotments[GRANT].milliwatts
    assert serving(world, "inference") == serving(world, "research") == 1


def test_a_replica_beyond_the_grant_waits_and_says_for_what(world: SmallWorld):
    world.apply(hall("a", "4kW"))
    world.apply(factory("chat", replicas=4))
    live(world, 120, budget=4_000_000)
    ready = serving(world, "inference")
    assert 0 < ready < 4
    waiting = status(world, "inference", "chat").waiting
    assert len(waiting) == 4 - ready
    assert all(GRANT in entry.message for entry in waiting)
    world.apply(hall("a"))
    live(world, 120)
    assert serving(world, "inference") == 4
    world.settle()


def test_a_lowered_grant_cuts_only_those_who_pay_from_it(world: SmallWorld):
    world.apply(hall("a"))
    world.apply(factory("chat", replicas=1))
    world.apply(factory("free", "guests", replicas=1))
    live(world, 120)
    before = charged(world, "a", "guests")
    world.apply(hall("a", "1.5kW"))
    live(world, 30)
    assert charged(world, "a", "inference") <= 1_500_000
    assert charged(world, "a", "guests") >= before
    world.apply(hall("a"))
    live(world, 600)
    assert charged(world, "a", "inference") == charged(world, "a", "guests")


def test_what_a_lost_node_may_still_draw_stays_on_the_grant(world: SmallWorld):
    """P4: its replica starts elsewhere, on what is left of the budget."""
    world.apply(hall("a", "8.2kW"))
    world.apply(factory("chat", replicas=2))
    live(world, 120, budget=8_200_000)
    host = next(pod.spec.node_name for pod in world.ready_pods())
    world.agents[host].alive = False
    live(world, 120, budget=8_200_000)
    alive = [pod for pod in world.ready_pods() if pod.spec.node_name != host]
    assert len(alive) == 2, "what is left bears both, and they get it"
    assert charged(world, "a", "inference") > 7_900_000


def test_a_grant_that_not_even_the_minimum_fits_is_told_as_overdrawn(world: SmallWorld):
    world.apply(hall("a"))
    world.apply(factory("chat", replicas=2))
    live(world, 60)
    world.apply(hall("a", "1kW"))
    live(world, 60)
    within = condition(world, "inference", "chat", "WithinBudget")
    assert within.status == "False"
    assert within.reason == "OverBudget"
    assert GRANT in within.message
    assert PowerDomain in world.objects
