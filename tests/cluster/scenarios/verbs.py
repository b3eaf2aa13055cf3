"""What the operator asked of the API server, and what the chart lets it ask."""

import json

from tokenfactory.twin.cluster import Cluster

OPERATOR = "tokenfactory-operator"
NOT_IN_A_LIFE = {
    # Old checkpoints, and curves learned by the operator: minutes of traffic.
    ("delete", "checkpoints"),
    ("create", "powerprofiles"),
    ("patch", "powerprofiles/status"),
    # Only when a write of ours was not answered.
    ("get", "events"),
}
Verbs = set[tuple[str, str]]


def tried_in_vain(cluster: Cluster) -> Verbs:
    """What the chart does not grant it."""
    return verbs_used(cluster) - verbs_granted(cluster)


def unused(cluster: Cluster) -> Verbs:
    """What the chart grants it and it never does."""
    return verbs_granted(cluster) - verbs_used(cluster) - NOT_IN_A_LIFE


def verbs_used(cluster: Cluster) -> Verbs:
    """(verb, resource) of every request that the operator made of a resource, refused ones as well."""
    return {
        (verb, f"{resource}/{sub}" if sub else resource)
        for user, verb, _, resource, sub in cluster.audit_verbs()
        if user.endswith(f":{OPERATOR}") and resource
    }


def verbs_granted(cluster: Cluster) -> Verbs:
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
