"""Objects that the controller writes whole: their specs as they came, so that each field of ours can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tokenfactory.api.meta import Resource
from tokenfactory.kube.objects import DeploymentStatus


class Deployment(Resource, frozen=True, kw_only=True):
    KIND: ClassVar[str] = "Deployment"
    PLURAL: ClassVar[str] = "deployments"
    SHORT: ClassVar[str] = "deploy"
    NAMESPACED: ClassVar[bool] = True

    api_version: str = "apps/v1"
    spec: dict[str, Any] = {}
    status: DeploymentStatus = DeploymentStatus()


class LeaderWorkerSet(Resource, frozen=True, kw_only=True):
    """Groups of pods that serve as one: https://lws.sigs.k8s.io. Its CRD need not be there."""

    KIND: ClassVar[str] = "LeaderWorkerSet"
    PLURAL: ClassVar[str] = "leaderworkersets"
    SHORT: ClassVar[str] = "lws"
    NAMESPACED: ClassVar[bool] = True

    api_version: str = "leaderworkerset.x-k8s.io/v1"
    spec: dict[str, Any] = {}


class Service(Resource, frozen=True, kw_only=True):
    KIND: ClassVar[str] = "Service"
    PLURAL: ClassVar[str] = "services"
    SHORT: ClassVar[str] = "svc"
    NAMESPACED: ClassVar[bool] = True

    api_version: str = "v1"
    spec: dict[str, Any] = {}


def says(actual: Any, ours: Any) -> bool:
    """Does `actual` hold everything that we want, whatever else others or defaults have added?"""
    if isinstance(ours, Mapping):
        if not isinstance(actual, Mapping):
            return not ours and actual is None
        return all(says(actual.get(key), value) for key, value in ours.items())
    if isinstance(ours, Sequence) and not isinstance(ours, str):
        if not isinstance(actual, Sequence) or isinstance(actual, str):
            return not ours and actual is None
        if ours and isinstance(ours[0], Mapping) and "name" in ours[0]:
            by_name = {entry.get("name"): entry for entry in actual}
            return all(says(by_name.get(entry["name"]), entry) for entry in ours)
        return len(actual) == len(ours) and all(says(a, o) for a, o in zip(actual, ours, strict=True))
    if ours in (None, "", 0, False):
        return actual in (None, ours)
    return bool(actual == ours)
