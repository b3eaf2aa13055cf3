"""More servers under one limit than their caps would allow, because they draw less: until they do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.unit.controller.manifests import Manifest, factory, hall, model
from tests.unit.controller.small_world import SmallWorld

from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.controller.cutting import cuts
from tokenfactory.planning.power.oversubscription import Watch

LIMIT = 66_000_000
A_DAY = {600: 16_000, 710: 1_000, 760: 280}
"""How often which permille of the charge was drawn: as serving does, seldom near its limits."""


def tight(limit: str, mode: str = "Statistical") -> Manifest:
    overload = [{"percent": 130, "seconds": 60}]
    return hall(limit, reserve="0%", hold="8s", overload=overload, oversubscription={"mode": mode})


def chat(band: int) -> Manifest:
    return factory(model(image="llama-70b", gpus=8, band=band, replicas=(13, 13)))


def site(mode: str = "Statistical", *, load: int = 650) -> SmallWorld:
    """Thirteen servers of 6.6 kW at full caps, where ten would fill the limit."""
    world = SmallWorld()
    for number in range(13):
        world.add_node(f"n{number:02}")
        world.agents[f"n{number:02}"].load_permille = load
    world.apply(tight("66kW", mode), chat(band=100))
    world.memory = replace(world.memory, watches={"hall": Watch(counts=A_DAY)})
    world.settle()
    return world


def charge(world: SmallWorld) -> int:
    return world.plan().books.ledger.charge("hall")


def draw(world: SmallWorld) -> int:
    return sum(
        1_000_000 + sum(agent.enforced.values()) * agent.load_permille // 1000
        for agent in world.agents.values()
    )


def rounds(world: SmallWorld, count: int) -> int:
    """Goes on for a while; says how high the draw came."""
    highest = 0
    for _ in range(count):
        world.operate()
        world.others()
        highest = max(highest, draw(world))
    return highest


def verdict(world: SmallWorld) -> tuple[str, str]:
    (found,) = [c for c in world.objects[PowerDomain]["", "hall"].status.conditions if c.type == "Compliant"]
    return found.status, found.reason


def test_thirty_percent_more_servers_run_at_higher_caps_without_a_brake() -> None:
    world, never = site(), site("Never")
    assert charge(never) <= LIMIT
    highest = rounds(world, 20)
    assert charge(world) > 1.15 * LIMIT
    assert highest < LIMIT
    assert world.memory.watches["hall"].brakes == 0
    assert verdict(world) == ("True", "Oversubscribed")
    gpus = [limit for agent in world.agents.values() for limit in agent.enforced.values()]
    assert min(gpus) > max(limit for agent in never.agents.values() for limit in agent.enforced.values())


def test_nodes_whose_reports_no_longer_arrive_count_in_full_although_their_heartbeats_do() -> None:
    world = site()
    rounds(world, 15)
    for agent in list(world.agents.values())[:10]:
        agent.reports, agent.load_permille = False, 1000
    rounds(world, 1)
    assert draw(world) > LIMIT, "nobody could know yet, and the breaker bears it"
    rounds(world, 19)
    assert draw(world) <= LIMIT
    assert world.plan().plan.again_after_seconds <= 5
    assert world.memory.watches["hall"].brakes == 1


def test_a_surge_of_the_draw_brings_the_sheet_down_at_once_and_it_stays_down_while_the_surge_lasts() -> None:
    world = site()
    rounds(world, 15)
    for agent in world.agents.values():
        agent.load_permille = 950
    world.others()
    assert draw(world) > LIMIT
    world.operate()
    world.others()
    assert draw(world) <= LIMIT
    assert charge(world) <= LIMIT
    assert rounds(world, 12) <= LIMIT
    assert verdict(world) == ("True", "Braking")
    assert world.memory.watches["hall"].brakes == 1
    for agent in world.agents.values():
        agent.load_permille = 600
    rounds(world, 40)
    assert charge(world) > 1.15 * LIMIT
    assert world.memory.watches["hall"].brakes == 1


def test_silent_servers_count_in_full_and_the_others_make_room() -> None:
    world = site()
    rounds(world, 15)
    full = charge(world)
    lost = ("n00", "n01", "n02")
    for name in lost:
        world.agents[name].alive = False
    rounds(world, 20)
    ledger = world.plan().books.ledger
    silent = sum(ledger.node_charge(name) for name in lost)
    assert charge(world) < full
    assert silent + (LIMIT * 93 // 100 - silent) * 1000 // 760 >= charge(world)


def test_a_restarted_operator_neither_cuts_nor_raises_what_it_does_not_know_yet() -> None:
    world = site()
    rounds(world, 15)
    before = charge(world)
    world.crash()
    rounds(world, 10)
    assert charge(world) == before
    world.apply(chat(band=90))
    rounds(world, 10)
    assert charge(world) <= before


@pytest.mark.parametrize("limit", ["66kW", "50kW"])
def test_a_cut_of_the_limit_is_a_cut_of_the_ceiling(limit: str) -> None:
    """And a change of the domain that lowers nothing is none."""
    world = site()
    rounds(world, 15)
    last = world.plan()
    domain = world.objects[PowerDomain]["", "hall"]
    world.apply(tight(limit))
    snapshot = world.snapshot()
    actions = cuts(last, snapshot.domains, snapshot.sheets, snapshot.wall)
    assert bool(actions) == (limit != "66kW")
    assert domain.metadata.name == "hall"


def test_without_the_operator_all_fall_back_below_the_limit() -> None:
    world = site()
    rounds(world, 15)
    assert world.plan().books.ledger.fallback_load("hall") <= LIMIT
