"""Histories that are too rare for the search: each is fine as shipped, and a violation with one rule left out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.fault.bugs import BUGS
from tests.fault.parts import HIGH, HOLD, LOW, OVERHEAD, Gpu, Kit, Machine, Pod, Site, Violation, W
from tests.fault.rest import Score, rest
from tests.fault.sites import CLASSES
from tests.fault.world import World

from tokenfactory.planning.power.governor import Allowance
from tokenfactory.planning.power.lines import Domain

X = CLASSES[0]


def a_world(kit: Kit, caps: dict[str, int], limits: dict[str, int], *, runs: bool = True) -> World:
    """Node n0 under site and r1, with one model that `runs`; r2 is empty."""
    parents = {"site": None, "r1": "site", "r2": "site"}
    domains = {name: Domain(name, parent, limits[name], HOLD) for name, parent in parents.items()}
    targets = {name: {X: Allowance(watts * W, LOW)} for name, watts in caps.items()}
    site = Site(1, domains, {"n0": ("site", "r1")}, targets)
    world = World(site, {"n0": Machine("n0", guarded=True, gpus=(Gpu(),))}, Kit())
    if runs:
        world.pods["p0"] = Pod("p0", "n0", X, 1)
    world.elect(clean=False)
    rest(world, Score())
    world.kit = kit
    return world


def arrive(world: World) -> None:
    while world.inflight:
        world.deliver(0)
        world.check()


def a_fence_is_late(kit: Kit) -> None:
    """The machine is seen to be off; before the fence for that boot lands, it is on again and its model runs."""
    world = a_world(
        kit, {"site": 700, "r1": 500, "r2": 500}, dict.fromkeys(("site", "r1", "r2"), OVERHEAD + 500 * W)
    )
    leader = world.leaders[-1]
    world.power_off("n0")
    leader.heard = frozenset()
    world.lead_nodes(leader)
    world.power_on("n0")
    world.start_agent("n0")
    world.read_own("n0")
    world.list_sheets("n0")
    world.govern("n0")
    while world.agents["n0"].to_set:
        world.set_next("n0")
    world.report("n0")
    status = world.inflight.pop()
    if world.start("p0"):
        world.deliver(0)
        if world.nodes["n0"].spec.fence is not None and world.ledger(leader).node_charge("n0") == 0:
            raise Violation("P4: a running model is charged nothing")
    world.inflight.append(status)
    arrive(world)


def a_domain_is_left_and_taken_again(kit: Kit) -> None:
    """r1 to r2 to r1, while the agent still reads the spec that named r2 alone."""
    world = a_world(
        kit, {"site": 700, "r1": 300, "r2": 600}, dict.fromkeys(("site", "r1", "r2"), OVERHEAD + HIGH)
    )
    leader = world.leaders[-1]

    def go(rack: str) -> None:
        world.change_site(replace(world.site, version=world.site.version + 1, paths={"n0": ("site", rack)}))
        while leader.site_queue:
            world.next_site_event(leader)
        lead()

    def lead() -> None:
        while leader.node_queue:
            world.next_node_event(leader)
        world.lead_nodes(leader)
        arrive(world)

    def agent_acts() -> None:
        while world.agents["n0"].node_queue:
            world.next_own("n0")
        world.govern("n0")
        while world.agents["n0"].to_set:
            world.set_next("n0")

    go("r2")
    agent_acts()
    world.report("n0")
    arrive(world)
    lead()
    assert world.nodes["n0"].spec.former_paths == ()
    agent_acts()
    assert world.machines["n0"].draw() == OVERHEAD + 600 * W
    go("r1")
    if world.machines["n0"].draw() > world.ledger(leader).node_charge("n0"):
        raise Violation("P1: the agent obeys r2 alone and is charged by r1's sheet")


def a_sheet_is_deleted_and_written_anew(kit: Kit) -> None:
    """The agent acknowledges the old sheet late, and obeys it while the ledger counts by the new one."""
    generous = dict.fromkeys(("site", "r1", "r2"), OVERHEAD + 600 * W)
    world = a_world(kit, {"site": 700, "r1": 200, "r2": 200}, generous, runs=False)
    leader = world.leaders[-1]

    def want(watts: int, limit: int, *, rounds: int = 3) -> None:
        domains = {n: replace(d, usable_milliwatts=limit) for n, d in world.site.domains.items()}
        targets = {**world.site.targets, "r1": {X: Allowance(watts * W, LOW)}}
        changed = replace(world.site, version=world.site.version + 1, domains=domains, targets=targets)
        world.change_site(changed)
        lead(rounds)

    def lead(rounds: int = 3) -> None:
        while leader.site_queue:
            world.next_site_event(leader)
        while leader.sheet_queue:
            world.next_sheet_event(leader)
        while leader.node_queue:
            world.next_node_event(leader)
        for write in (world.lead_sheets, world.lead_nodes, world.lead_sheets)[:rounds]:
            write(leader)
            arrive(world)

    want(600, OVERHEAD + 600 * W)
    while world.agents["n0"].sheet_queue:
        world.next_sheet("n0")
    world.govern("n0")
    world.report("n0")
    late = world.inflight.pop()
    assert world.delete_sheet("r1")
    want(300, OVERHEAD + 300 * W, rounds=1)
    world.inflight.append(late)
    arrive(world)
    lead()
    world.pods["p0"] = Pod("p0", "n0", X, 1)
    lead()
    world.lead_ungate(leader)
    world.bind("p0")
    while world.agents["n0"].node_queue:
        world.next_own("n0")
    world.govern("n0")
    while world.agents["n0"].to_set:
        world.set_next("n0")
    world.start("p0")
    world.check()


RARE = {
    "forget that a sheet was there": a_sheet_is_deleted_and_written_anew,
    "start before the boot is known": a_fence_is_late,
    "credit a path left and taken again": a_domain_is_left_and_taken_again,
}


@pytest.mark.parametrize("bug", RARE)
def test_a_rare_history_is_fine_as_shipped(bug: str) -> None:
    RARE[bug](Kit())


@pytest.mark.parametrize("bug", RARE)
def test_a_rare_history_breaks_with_one_rule_left_out(bug: str) -> None:
    with pytest.raises(Violation):
        RARE[bug](BUGS[bug])
