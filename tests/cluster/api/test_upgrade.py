"""Objects that an older version of a kind took live on under the present one: what nobody touches is not judged anew."""

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from tests.cluster.api.manifests import GOOD, changed
from tests.waiting import wait_for

from tokenfactory.api import crd
from tokenfactory.api.meta import VERSION
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.twin.cluster import Cluster

pytestmark = pytest.mark.cluster

GROUP = "upgrade.example.dev"
"""The same kinds under another group, so that the shared cluster keeps its own as they are."""


def looser(schema: Any) -> Any:
    """A schema as an early version may have been: the same fields, no bounds, no rules, nothing required."""
    dropped = {
        "x-kubernetes-validations",
        "maxLength",
        "minLength",
        "maxItems",
        "minItems",
        "maximum",
        "required",
    }
    dropped |= {
        "minimum",
        "enum",
        "maxProperties",
        "default",
        "x-kubernetes-list-type",
        "x-kubernetes-list-map-keys",
    }
    if isinstance(schema, list):
        return [looser(one) for one in schema]
    if isinstance(schema, dict):
        return {name: looser(inner) for name, inner in schema.items() if name not in dropped}
    return schema


class Upgrade:
    """One kind, first in a loose version, then in the present one."""

    def __init__(self, cluster: Cluster, kind: type, namespace: str) -> None:
        self._cluster = cluster
        self.present = crd.crd(kind)
        self.present["metadata"]["name"] = f"{kind.PLURAL}.{GROUP}"
        self.present["spec"]["group"] = GROUP
        self.present["spec"]["names"] |= {"shortNames": [], "categories": []}
        scope = f"namespaces/{namespace}/" if kind.NAMESPACED else ""
        self.path = f"/apis/{GROUP}/{VERSION}/{scope}{kind.PLURAL}"

    def install_old(self) -> None:
        version = self.present["spec"]["versions"][0]
        schema = version["schema"] | {"openAPIV3Schema": looser(version["schema"]["openAPIV3Schema"])}
        version = version | {"schema": schema}
        self._apply(self.present | {"spec": self.present["spec"] | {"versions": [version]}})
        self._cluster.kubectl("wait", "--for=condition=Established", "crd", self.present["metadata"]["name"])
        wait_for(lambda: self._cluster.request("GET", self.path)[0] == 200, "the old version is served")

    def install_present(self, refused: dict[str, Any]) -> None:
        self._apply(self.present)
        wait_for(
            lambda: self._cluster.request("POST", self.path + "?dryRun=All", refused)[0] == 422,
            "the present version is in force",
        )

    def remove(self) -> None:
        self._cluster.kubectl("delete", "crd", self.present["metadata"]["name"], "--ignore-not-found")

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        status, answer = self._cluster.request("POST", self.path, body)
        assert status == 201, answer
        return answer

    def get(self, name: str) -> dict[str, Any]:
        return self._cluster.request("GET", f"{self.path}/{name}")[1]

    def update(self, name: str, change: dict[str, Any], part: str = "") -> tuple[int, Any]:
        return self._cluster.request("PUT", f"{self.path}/{name}{part}", changed(self.get(name), change))

    def _apply(self, body: dict[str, Any]) -> None:
        self._cluster.kubectl(
            "apply", "--server-side", "--force-conflicts", "-f", "-", input=yaml.safe_dump(body)
        )


@pytest.fixture
def upgrade(cluster: Cluster, namespace: str, request: pytest.FixtureRequest) -> Iterator[Upgrade]:
    running = Upgrade(cluster, request.param, namespace)
    running.install_old()
    yield running
    running.remove()


def of_old_group(name: str, change: dict[str, Any]) -> dict[str, Any]:
    return changed(GOOD[name], {"apiVersion": f"{GROUP}/{VERSION}"} | change)


@pytest.mark.parametrize("upgrade", [PowerDomain], indirect=True)
def test_an_old_domain_survives(upgrade: Upgrade):
    old = of_old_group(
        "domain",
        {
            "metadata": {"name": "hall.a-of-the-old-site"},
            "spec": {
                "reserve": "100%",
                "hold": "8 minutes",
                "parent": "Old Site",
                "timetable": [{"end": "17:00"}],
            },
        },
    )
    upgrade.create(old)
    name = old["metadata"]["name"]

    upgrade.install_present(refused=changed(old, {"metadata": {"name": "another"}}))

    assert upgrade.get(name)["spec"]["hold"] == "8 minutes"
    relabelled, answer = upgrade.update(name, {"metadata": {"labels": {"team": "power"}}})
    assert relabelled == 200, answer["message"]
    assert upgrade.update(name, {"status": {"limit": "120kW", "charge": "100kW"}}, "/status")[0] == 200
    cut, answer = upgrade.update(name, {"spec": {"limit": "50kW"}})
    assert cut == 200, f"a cut is never refused for what was there before: {answer}"
    assert upgrade.update(name, {"spec": {"timetable": [{"limit": "50%"}, {}]}})[0] == 422, (
        "touched, so judged"
    )
    worse, answer = upgrade.update(name, {"spec": {"hold": "9 minutes"}})
    assert worse == 422
    assert "'9 minutes' is not a duration" in answer["message"]
    assert upgrade.update(name, {"spec": {"hold": "8m"}})[0] == 200


@pytest.mark.parametrize("upgrade", [TokenFactory], indirect=True)
def test_an_old_factory_survives(upgrade: Upgrade):
    old = of_old_group(
        "factory",
        {
            "metadata": {"name": "chat.of.old"},
            "spec": {
                "efficiency": {"tokensPerJoule": "0"},
                "models": [{"nim": {"image": "llama:latest"}, "replicas": {"min": 9, "max": 4}}],
            },
        },
    )
    upgrade.create(old)
    name = old["metadata"]["name"]

    upgrade.install_present(refused=changed(old, {"metadata": {"name": "another"}}))

    assert upgrade.get(name)["spec"]["models"][0]["nim"]["image"] == "llama:latest"
    assert upgrade.update(name, {"status": {"ready": "4/4"}}, "/status")[0] == 200
    assert upgrade.update(name, {"spec": {"power": {"budget": "10kW"}}})[0] == 200
    assert upgrade.update(name, {"spec": {"models": [{"band": 7}]}})[0] == 200, (
        "min, max and image stay as they were"
    )
    assert upgrade.update(name, {"spec": {"models": [{"replicas": {"min": 8}}]}})[0] == 422
    assert upgrade.update(name, {"spec": {"models": [{"replicas": {"max": 9}}]}})[0] == 200
