"""Good objects, changes to them, and the API server asked about both."""

import copy
from pathlib import Path
from typing import Any

import yaml

from tokenfactory.api import crd
from tokenfactory.api.meta import API_VERSION
from tokenfactory.twin.cluster import Cluster

HERE = Path(__file__).parent
GOOD: dict[str, dict[str, Any]] = yaml.safe_load((HERE / "good.yaml").read_text())
BAD: list[dict[str, Any]] = yaml.safe_load((HERE / "bad.yaml").read_text())
KINDS = {kind.KIND: kind for kind in crd.KINDS}


def changed(value: Any, change: Any) -> Any:
    """As a merge patch, but a list is changed entry by entry, and grows when the change is longer."""
    if isinstance(change, dict) and isinstance(value, dict | None):
        merged = dict(value or {})
        for name, inner in change.items():
            if inner is None:
                merged.pop(name, None)
            else:
                merged[name] = changed(merged.get(name), inner)
        return merged
    if isinstance(change, list) and isinstance(value, list):
        kept = value[len(change) :]
        pairs = zip(change, value + [None] * len(change), strict=False)
        return [changed(old, new) for new, old in pairs] + kept
    return copy.deepcopy(change)


def collection(kind: str, namespace: str) -> str:
    ours = KINDS[kind]
    scope = f"namespaces/{namespace}/" if ours.NAMESPACED else ""
    return f"/apis/{API_VERSION}/{scope}{ours.PLURAL}"


class Asking:
    """The API server, asked whether it would take an object. Nothing is kept unless `create` is called."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self._cluster = cluster
        self._namespace = namespace

    def would_create(self, body: dict[str, Any]) -> tuple[int, Any]:
        return self._cluster.request(
            "POST", self._path(body, "") + "?dryRun=All&fieldValidation=Strict", body
        )

    def would_update(self, body: dict[str, Any], part: str = "") -> tuple[int, Any]:
        path = self._path(body, "/" + body["metadata"]["name"] + part)
        return self._cluster.request("PUT", path + "?dryRun=All&fieldValidation=Strict", body)

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        status, answer = self._cluster.request("POST", self._path(body, ""), body)
        assert status == 201, answer
        return answer

    def update(self, body: dict[str, Any], part: str = "") -> tuple[int, Any]:
        return self._cluster.request("PUT", self._path(body, "/" + body["metadata"]["name"] + part), body)

    def delete(self, body: dict[str, Any]) -> None:
        status, answer = self._cluster.request("DELETE", self._path(body, "/" + body["metadata"]["name"]))
        assert status == 200, answer

    def _path(self, body: dict[str, Any], rest: str) -> str:
        return collection(body["kind"], self._namespace) + rest
