"""How Kopf finds the API server from inside a pod."""

import kopf
import pytest

from tokenfactory.controller import shell


@pytest.mark.parametrize(
    ("host", "server"), [("10.96.0.1", "https://10.96.0.1:443"), ("fd00::1", "https://[fd00::1]:443")]
)
def test_in_a_pod_the_address_is_the_kubelets_and_not_dnss(monkeypatch, host, server):
    found = kopf.ConnectionInfo(server="https://kubernetes.default.svc", token="of the pod")
    monkeypatch.setattr(kopf, "login_with_service_account", lambda **_: found)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    login = shell._login()
    assert (login.server, login.token) == (server, "of the pod")
