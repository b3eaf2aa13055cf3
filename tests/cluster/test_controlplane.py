"""The control plane is a real one: what it promises to the tests that stand on it."""

import json

import pytest

from tokenfactory.twin.cluster import Cluster, ClusterError

pytestmark = pytest.mark.cluster


def test_a_client_certificate_is_that_user_and_rbac_decides(cluster: Cluster, namespace: str):
    alice = cluster.kubeconfig_for("alice", ["team a", "ops"])

    me = json.loads(cluster.kubectl("auth", "whoami", "-o", "json", kubeconfig=alice).stdout)
    assert me["status"]["userInfo"]["username"] == "alice"
    assert set(me["status"]["userInfo"]["groups"]) == {"team a", "ops", "system:authenticated"}

    with pytest.raises(ClusterError, match=r'User "alice" cannot list resource "pods"'):
        cluster.kubectl("get", "pods", "-n", namespace, kubeconfig=alice)
    cluster.kubectl("create", "rolebinding", "ops", "--clusterrole=view", "--group=ops", "-n", namespace)
    cluster.kubectl("get", "pods", "-n", namespace, kubeconfig=alice)
