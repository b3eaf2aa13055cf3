"""The product once through, as `make demo SCENARIO=smoke` runs it: real control plane, operator, agents, chart."""

from pathlib import Path

import pytest
from tests.cluster.scenarios.verbs import tried_in_vain

from tokenfactory.twin.cluster import Cluster
from tokenfactory.twin.demo import Demo, plans
from tokenfactory.twin.site import Site

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


async def test_from_apply_to_tokens_to_a_lost_node_inside_the_budget(own_cluster: Cluster, tmp_path: Path):
    said: list[str] = []
    async with Site(own_cluster, tmp_path / "site", plans()) as site:
        demo = Demo(site, said.append)
        await demo.come_up()
        await demo.checkpointed()
        incident = await demo.lose_a_node()
        demo.verdict()
    assert incident["phase"] == "Closed"
    assert site.samples > 100
    assert site.breaches == []
    assert tried_in_vain(own_cluster) == set(), "the operator tried what the chart does not grant it"
