"""What must not grow with the number of nodes, counted at the API server: how often anything is listed or written.

Seconds are for `make bench B=scale`. This is one site of 40 nodes on a real control plane, with the operator's own
process and the agents' real code; a busy machine changes none of the counts.
"""

from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial

import msgspec
import pytest
import pytest_asyncio
from tests.scale import yard
from tests.waiting import until

from tokenfactory.agent.pace import Pace
from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.gpu_node import AppliedEpoch, GPUNode
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.api.quantities import parse_power
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.kube.client import MERGE, Client
from tokenfactory.kube.listing import Listing
from tokenfactory.kube.resources import collection_path
from tokenfactory.twin.cluster import Cluster
from tokenfactory.twin.hollow_fleet import HollowFleet

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

NODES = 40
PATIENCE_SECONDS = 240.0
PACE = Pace(tick=15.0, observe=30.0, pods=30.0, tune=60.0, wear=600.0, meter=2.0, report=4.0)
"""Reports come often, so that what a node draws is soon old news."""


@dataclass
class Site:
    client: Client
    cluster: Cluster
    fleet: HollowFleet
    operator: yard.Operator

    async def all(self, kind):
        return (await Listing(self.client, kind, collection_path(kind), {}, 500).read()).items

    async def sheets(self) -> list[CapSheet]:
        return [sheet for sheet in await self.all(CapSheet) if sheet.spec.renewal is None]

    async def serves(self) -> bool:
        self.operator.keep()
        self.fleet.check()
        factories = await self.all(TokenFactory)
        return len(factories) == 2 and all(
            any(it.type == "Ready" and it.status == "True" for it in each.status.conditions)
            for each in factories
        )

    async def told(self) -> dict[str, object]:
        """What the statuses of all domains and factories say."""
        found = [*await self.all(PowerDomain), *await self.all(TokenFactory)]
        return {each.metadata.name: msgspec.to_builtins(each.status) for each in found}

    async def rest(self, renewals: int = 2) -> None:
        """Until the operator has kept its Lease so often in a row and said nothing else."""
        audit = yard.Audit.from_now(self.cluster)
        await until(lambda: audit.rested() >= renewals, "the operator to rest", PATIENCE_SECONDS, every=0.25)

    async def lower(self, share: float) -> tuple[str, int, float]:
        """The root's limit, to that share of what is charged. Whose sheet fell, its epoch, and the limit in watts."""
        domain = await self.client.get(PowerDomain, ("", yard.ROOT))
        before = {sheet.spec.domain: sheet.spec.epoch for sheet in await self.sheets()}
        watts = int(share * int(parse_power(domain.status.charge)) / 1000 / 0.97)
        path = f"/apis/tokenfactory.dev/v1alpha1/powerdomains/{yard.ROOT}"
        await self.client.request("PATCH", path, body={"spec": {"limit": f"{watts}W"}}, content_type=MERGE)

        async def newer() -> tuple[str, int] | None:
            found = [
                (sheet.spec.domain, sheet.spec.epoch)
                for sheet in await self.sheets()
                if sheet.spec.epoch > before[sheet.spec.domain]
            ]
            return found[0] if found else None

        name, epoch = await until(newer, "a lower sheet", PATIENCE_SECONDS, every=0.25)
        return name, epoch, float(watts)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    folder = tmp_path_factory.mktemp("yard")
    with Cluster.up(folder / "cluster", yard.options()) as cluster:
        yard.prepare(cluster)
        operator = yard.Operator(cluster, folder / "operator.log")
        cluster.kubectl("apply", "--server-side", "-f", "-", input=yard.manifests(NODES))
        operator.start()
        try:
            async with (
                await Client.connect(cluster.kubeconfig) as client,
                HollowFleet(cluster, yard.plans(NODES), pace=PACE, lease_seconds=60) as fleet,
            ):
                made = Site(client, cluster, fleet, operator)
                await until(made.serves, "every replica to serve", PATIENCE_SECONDS, every=0.25)
                yield made
        finally:
            operator.stop()


async def test_coming_up_takes_a_handful_of_writes_for_each_node_and_pod(site: Site) -> None:
    events = [event for event in yard.Audit(site.cluster).events() if yard.by(event, yard.OPERATOR)]
    pods = site.fleet.pods
    assert pods == NODES // 2 * 3
    made = Counter(yard.resource(event) for event in events if yard.writes(event) and yard.accepted(event))
    # On a machine so busy that it lost its Lease there was another one, which claims every node.
    starts = 1 + site.operator.restarts
    # A GPUNode is made, then each pod is listed on it, and then its address.
    assert made["gpunodes"] <= starts * NODES + 2 * pods
    assert made["nodes"] <= NODES  # the taint
    assert made["pods"] <= pods  # the gate
    listed = Counter(yard.resource(event) for event in events if event["verb"] == "list")
    assert listed["nodes"] == listed["pods"] == starts
    # What carries terms is listed before as well, each time that the leadership is taken.
    assert max(listed["gpunodes"], listed["capsheets"]) <= 3 * starts


async def test_what_is_published_for_a_rack_goes_to_its_own_nodes(site: Site) -> None:
    """Of 600 racks, each sheet to each of 5,000 agents would be what the API server does all day."""
    heard = site.fleet.told.heard
    racks = {slot: times for slot, times in heard.items() if slot[0].startswith("r")}
    assert {domain for domain, _ in racks} == {f"r{rack:04}" for rack in range(NODES // yard.RACK)}
    assert max(map(len, racks.values())) == yard.RACK
    assert max(len(times) for slot, times in heard.items() if slot[0] == yard.ROOT) == NODES


async def test_a_settled_factory_costs_no_write_but_its_lease_and_the_renewals(site: Site) -> None:
    """A site that writes by itself does so whenever its nodes report."""
    await site.rest(renewals=5)  # longer than statuses wait for each other
    audit, reports, before = yard.Audit.from_now(site.cluster), site.fleet.status_writes, await site.told()
    await until(
        partial(_have_reported, site, reports + 2 * NODES),
        "all to report twice",
        PATIENCE_SECONDS,
        every=0.25,
    )
    written = [slot for slot in audit.writes(yard.OPERATOR) if not yard.is_kept(slot)]
    after = await site.told()
    assert written == [], {
        name: (before[name], after[name]) for name in before if before[name] != after[name]
    }


def _have_reported(site: Site, reports: int) -> bool:
    return site.fleet.status_writes >= reports


async def test_a_cut_is_one_write_that_each_node_answers_by_itself(site: Site) -> None:
    await site.rest(renewals=1)
    audit = yard.Audit.from_now(site.cluster)
    told = site.fleet.told
    domain, epoch, watts = await site.lower(0.95)
    await until(
        lambda: len(told.obeyed.get((domain, epoch), ())) == NODES,
        "all to obey",
        PATIENCE_SECONDS,
        every=0.25,
    )
    assert domain == yard.ROOT
    assert site.fleet.milliwatts + NODES * yard.OVERHEAD_WATTS * 1000 <= watts * 1000
    await site.rest()
    written = audit.writes(yard.OPERATOR)
    sheets = {slot: n for slot, n in written.items() if slot[1] == "capsheets" and not yard.is_renewal(slot)}
    assert sheets == {("update", "capsheets", yard.ROOT): 1}
    assert not [slot for slot in written if slot[1] in {"gpunodes", "nodes", "pods"}]
    assert len(told.heard[domain, epoch]) == NODES
    acknowledged = [node.status.applied for node in await site.all(GPUNode)]
    assert all(AppliedEpoch(domain=domain, epoch=epoch) in applied for applied in acknowledged)
