"""What people apply to a small world, in the few words in which one test's site differs from another's.

A field that has no word here is written as the API has it; one that is None is left out.
"""

from typing import Any

Manifest = dict[str, Any]
LLAMA_70B = "llama-3.3-70b-instruct"
LLAMA_8B = "llama-3.1-8b-instruct"
GPU_NODES = {"matchLabels": {"nvidia.com/gpu.present": "true"}}


def domain(name: str, limit: str, **spec: Any) -> Manifest:
    return _object("PowerDomain", {"name": name}, {"limit": limit, **spec})


def hall(limit: str, **spec: Any) -> Manifest:
    """A domain of every node that has GPUs, each with 1 kW besides them."""
    return domain("hall", limit, **{"nodeOverhead": "1kW", "nodeSelector": GPU_NODES, **spec})


def rack(letter: str, limit: str, **spec: Any) -> Manifest:
    """A domain inside the hall, of the nodes whose label `rack` says so."""
    selector = {"matchLabels": {"rack": letter}}
    return domain(f"rack-{letter}", limit, **{"parent": "hall", "nodeSelector": selector, **spec})


def model(
    name: str = "llama",
    *,
    image: str = "llama",
    tag: str = "1.8.0",
    gpus: int = 4,
    replicas: tuple[int, int] | None = (1, 1),
    **more: Any,
) -> Manifest:
    return _said(
        {
            "name": name,
            "nim": {"image": f"nvcr.io/nim/meta/{image}:{tag}"},
            "gpusPerReplica": gpus,
            "replicas": {"min": replicas[0], "max": replicas[1]} if replicas else None,
            **more,
        }
    )


def factory(*models: Manifest, name: str = "chat", namespace: str = "inference", **spec: Any) -> Manifest:
    spec = {"power": {"domain": "hall"}, "models": models, **spec}
    return _object("TokenFactory", {"name": name, "namespace": namespace}, spec)


def profile(name: str, gpu_product: str, *points: tuple[int, str, str], **spec: Any) -> Manifest:
    """Of the 70B model; each point is a concurrency, watts, and tokens a second."""
    made = [dict(zip(("concurrency", "watts", "tokensPerSecond"), point, strict=True)) for point in points]
    spec = {"model": LLAMA_70B, "gpuProduct": gpu_product, "points": made, **spec}
    return _object("PowerProfile", {"name": name}, spec)


def _object(kind: str, metadata: dict[str, str], spec: Manifest) -> Manifest:
    return {
        "apiVersion": "tokenfactory.dev/v1alpha1",
        "kind": kind,
        "metadata": metadata,
        "spec": _said(spec),
    }


def _said(fields: Manifest) -> Manifest:
    return {name: value for name, value in fields.items() if value is not None}
