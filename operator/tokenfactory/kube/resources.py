"""Where a kind lives in the API, told from its type."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec

from tokenfactory.api.meta import Resource

Key = tuple[str, str]
"""Namespace (empty for cluster-scoped kinds) and name."""


def key_of(obj: Resource) -> Key:
    return (obj.metadata.namespace or "", obj.metadata.name)


@cache
def api_version_of(kind: type[Resource]) -> str:
    (version,) = (f.default for f in msgspec.structs.fields(kind) if f.name == "api_version")
    return str(version)


@cache
def collection_path(kind: type[Resource], namespace: str = "") -> str:
    """The path of all objects of a kind, or of those in one namespace."""
    version = api_version_of(kind)
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    if not namespace:
        return f"{root}/{kind.PLURAL}"
    if not kind.NAMESPACED:
        message = f"{kind.KIND} is cluster-scoped: leave out the namespace {namespace!r}"
        raise ValueError(message)
    return f"{root}/namespaces/{namespace}/{kind.PLURAL}"


def object_path(kind: type[Resource], key: Key, subresource: str = "") -> str:
    namespace, name = key
    if kind.NAMESPACED and not namespace:
        message = f"{kind.KIND} {name!r} lives in a namespace: say which"
        raise ValueError(message)
    path = f"{collection_path(kind, namespace)}/{name}"
    return f"{path}/{subresource}" if subresource else path


def body_of(
    kind: type[Resource], key: Key, content: dict[str, Any], metadata: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A whole manifest. Types leave out what equals their default, so kind and version are said here."""
    namespace, name = key
    meta: dict[str, Any] = {**(metadata or {}), "name": name}
    if namespace:
        meta["namespace"] = namespace
    return {**content, "apiVersion": api_version_of(kind), "kind": kind.KIND, "metadata": meta}
