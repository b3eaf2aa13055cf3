"""The product once through, as `make demo SCENARIO=smoke` runs it: real control plane, operator, agents, chart."""

import json
from pathlib import Path

import pytest

from tokenfactory.twin.cluster import Cluster
from tokenfactory.twin.demo import Demo, plans
from tokenfactory.twin.site import Site

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


OPERATOR = "tokenfactory-operator"
NOT_IN_THIS_RUN = {
    # Domains and nodes that are gone for good; models and Services that are no longer asked for.
    ("delete", "capsheets"),
    ("delete", "gpunodes"),
    ("delete", "deployments"),
    ("delete", "services"),
    # What is applied server-side is a patch in the log, and needs the right to create where there is nothing yet.
    *(("create", kind) for kind in ("checkpoints", "deployments", "services")),
    # Old checkpoints, and curves learned by the operator.
    ("delete", "checkpoints"),
    ("create", "powerprofiles"),
    ("patch", "powerprofiles/status"),
    # Lists and watches see all of these; a single one is read only in doubt.
    *(
        ("get", kind)
        for kind in ("powerdomains", "tokenfactories", "powerprofiles", "checkpoints", "capsheets")
    ),
    *(
        ("get", kind)
        for kind in ("gpunodes", "nodes", "namespaces", "pods", "deployments", "services", "events")
    ),
    ("create", "events"),
    ("patch", "events"),
}


def verbs_used(cluster: Cluster) -> set[tuple[str, str]]:
    """(verb, resource) of every request that the operator made of a resource, refused ones as well."""
    return {
        (verb, f"{resource}/{sub}" if sub else resource)
        for user, verb, _, resource, sub in cluster.audit_verbs()
        if user.endswith(f":{OPERATOR}") and resource
    }


def verbs_granted(cluster: Cluster) -> set[tuple[str, str]]:
    """(verb, resource) of the chart's roles for the operator."""
    said = json.loads(cluster.kubectl("get", "clusterroles,roles", "-A", "-o", "json").stdout)
    return {
        (verb, resource)
        for role in said["items"]
        if role["metadata"]["name"] == OPERATOR
        for rule in role["rules"]
        for verb in rule["verbs"]
        for resource in rule["resources"]
    }


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
    used, granted = verbs_used(own_cluster), verbs_granted(own_cluster)
    assert used - granted == set(), "the operator tried what the chart does not grant it"
    assert granted - used - NOT_IN_THIS_RUN == set(), "the chart grants what the operator never does"
