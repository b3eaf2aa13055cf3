"""What matters of a site that has come to rest: everything that the operator decides or says.

Left out is what may differ between two sites that are equally right: names that Kubernetes makes up, times, versions
and epochs, which node a replica came to, what depends on where in its window a meter is, and when Kubernetes itself says
that it no longer hears a kubelet.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from tests.cluster.scenarios.scene import Scene

from tokenfactory.api import names

Object = dict[str, Any]
GROUPS = "/apis/leaderworkerset.x-k8s.io/v1/leaderworkersets"
NODES = "/api/v1/nodes"
PROFILES = "/apis/tokenfactory.dev/v1alpha1/powerprofiles"
KUBERNETES = "node.kubernetes.io/"
"""What Kubernetes taints nodes with."""
MADE_UP = {"clusterIP", "clusterIPs"}
"""Of a Service: Kubernetes' own choice."""


async def outcome(scene: Scene) -> Object:
    """All of it, as one value that can be compared."""
    site, namespace = scene.site, scene.namespace
    factories, domains, sheets, nodes, deployments, services, pods, saved = await asyncio.gather(
        *(
            _items(site.get(kind, namespace=namespace if kind in OURS else ""))
            for kind in ("tf", "pd", "sheet", "gn", "deploy", "svc", "pods", "ckpt")
        )
    )
    groups, machines, profiles = await asyncio.gather(
        *(asyncio.to_thread(_listed, scene, path) for path in (GROUPS, NODES, PROFILES))
    )
    grants = [grant for node in nodes for grant in node["spec"].get("pods", [])]
    return {
        "factories": {each["metadata"]["name"]: _factory(each) for each in factories},
        "domains": {each["metadata"]["name"]: _domain(each) for each in domains},
        "sheets": {each["metadata"]["name"]: _sheet(each["spec"]) for each in sheets},
        "caps of racks": _caps_of_racks(sheets),
        "grants": sorted((grant["class"], grant.get("released", False)) for grant in grants),
        "nodes": {each["metadata"]["name"]: _gpu_node(each) for each in nodes},
        "machines": {each["metadata"]["name"]: _machine(each) for each in machines},
        "workloads": sorted(map(_workload, deployments + groups + services)),
        "pods": sorted(map(_pod, pods)),
        "caps": sorted(
            (gpu.get("class", ""), gpu["enforcedMilliwatts"]) for node in nodes for gpu in node.get("status", {}).get("gpus", [])
        ),
        "checkpoints": sorted((each["spec"].get("model", ""), each.get("status", {}).get("phase", "")) for each in saved),
        "profiles": sorted(each["metadata"]["name"] for each in profiles if names.LEARNED_LABEL not in each["metadata"].get("labels", {})),
    }  # fmt: skip


OURS = {"tf", "deploy", "svc", "pods", "ckpt"}
"""Kinds that lie in the scenario's namespace."""


async def _items(listing: Any) -> list[Object]:
    found: list[Object] = (await listing)["items"]
    return found


def _listed(scene: Scene, path: str) -> list[Object]:
    """Of kinds that a site may not have: then there are none."""
    code, answer = scene.site.cluster.request("GET", path)
    return list(answer["items"]) if code == 200 else []


def difference(found: Any, expected: Any) -> str:
    """By part, down to the entries that differ; empty when nothing does."""
    return "\n".join(_differences("", found, expected))


def _differences(where: str, found: Any, expected: Any) -> list[str]:
    if found == expected:
        return []
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        return [
            line
            for part in sorted(found.keys() | expected.keys())
            for line in _differences(f"{where}.{part}".lstrip("."), found.get(part), expected.get(part))
        ]
    if isinstance(found, list | tuple) and isinstance(expected, list | tuple) and len(found) == len(expected):
        return [
            line
            for index, pair in enumerate(zip(found, expected, strict=True))
            for line in _differences(f"{where}[{index}]", *pair)
        ]
    return [f"{where}:\n  is   {json.dumps(found, default=str)}\n  not  {json.dumps(expected, default=str)}"]


def _conditions(status: Object) -> list[list[str]]:
    return sorted([each["type"], each["status"], each["reason"]] for each in status.get("conditions", []))


def _seen(found: Object) -> bool:
    return bool(found.get("status", {}).get("observedGeneration") == found["metadata"]["generation"])


def _factory(found: Object) -> Object:
    status = found.get("status", {})
    return {
        "seen": _seen(found),
        "ready": status.get("ready"),
        "charge": status.get("charge"),
        "budget": status.get("budget"),
        "conditions": _conditions(status),
        "models": [
            [each.get(part) for part in ("name", "ready", "desired", "cap", "charge", "boundBy")]
            for each in status.get("models", [])
        ],
        "waiting": sorted(each["reason"] for each in status.get("waiting", [])),
        "incidents": sorted(
            each["phase"] for each in status.get("incidents", []) if each["phase"] != "Closed"
        ),
    }


def _domain(found: Object) -> Object:
    """A rack's charge goes by which replica came to it; those of the roots say whether the sum is right."""
    status = found.get("status", {})
    root = "parent" not in found["spec"]
    return {
        "seen": _seen(found),
        "conditions": _conditions(status),
        **{part: status.get(part) for part in ("limit", "nodes", "lostNodes")},
        **({part: status.get(part) for part in ("charge", "headroom")} if root else {}),
    }


def _sheet(spec: Object) -> Object:
    """What its nodes may obey from now on. `earlier` is pruned when the sheet is written the next time."""
    parts = {part: spec.get(part) for part in ("domain", "tree", "holdMilliseconds")}
    caps = _caps(spec) if spec["domain"] == spec["tree"] else None
    return {**parts, "renewal": "renewal" in spec, "caps": caps}


def _caps(spec: Object) -> list[list[Any]]:
    return sorted([each["class"], each["cap"], each.get("fallback")] for each in spec.get("caps", []))


def _caps_of_racks(sheets: list[Object]) -> list[list[Any]]:
    """All together: a rack's sheet speaks of the classes that came to it."""
    found = [
        caps
        for each in sheets
        if each["spec"]["domain"] != each["spec"]["tree"]
        for caps in _caps(each["spec"])
    ]
    return sorted(caps for number, caps in enumerate(found) if caps not in found[:number])


def _gpu_node(found: Object) -> Object:
    spec, status = found["spec"], found.get("status", {})
    parts = ("path", "formerPaths", "overheadMilliwatts")
    return {
        **{part: spec.get(part) or None for part in parts},
        "fence": spec.get("fence", {}).get("method"),
        "quarantined": "quarantine" in spec,
        "mode": status.get("mode"),
        "conditions": _conditions(status),
    }


def _machine(found: Object) -> Object:
    spec = found["spec"]
    return {
        "taints": sorted(
            [each["key"], each["effect"]]
            for each in spec.get("taints", [])
            if not each["key"].startswith(KUBERNETES)
        ),
        "cordoned": spec.get("unschedulable", False),
    }


def _workload(found: Object) -> str:
    """All of its spec, and whose it is."""
    meta = found["metadata"]
    return json.dumps(
        {
            "name": meta["name"],
            "labels": meta.get("labels", {}),
            "owners": [[each["kind"], each["name"]] for each in meta.get("ownerReferences", [])],
            "finalizers": meta.get("finalizers", []),
            "spec": {part: value for part, value in found["spec"].items() if part not in MADE_UP},
        },
        sort_keys=True,
    )


def _pod(found: Object) -> list[Any]:
    meta, spec, status = found["metadata"], found["spec"], found["status"]
    ready = any(each["type"] == "Ready" and each["status"] == "True" for each in status.get("conditions", []))
    leaves = "deletionTimestamp" in meta
    return [
        meta["labels"].get(names.FACTORY_LABEL, ""),
        meta["labels"].get(names.MODEL_LABEL, ""),
        ready and not leaves,
        bool(spec.get("schedulingGates")),
        bool(spec.get("nodeName")),
        meta.get("annotations", {}).get(names.DELETION_COST, ""),
        leaves,
        spec["containers"][0]["image"],
    ]
