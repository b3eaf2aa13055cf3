"""Names that several parts must agree on: labels, annotations, the gate, the taint, how a class is called."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from tokenfactory.api.meta import GROUP

FIELD_MANAGER: Final = "tokenfactory"
GATE: Final = f"{GROUP}/power"
FACTORY_LABEL: Final = f"{GROUP}/factory"
MODEL_LABEL: Final = f"{GROUP}/model"
LEARNED_LABEL: Final = f"{GROUP}/learned"
"""On a PowerProfile that the operator made; one without it is a person's."""
MANAGED_TAINT: Final = f"{GROUP}/managed"
WAKE_PREFIX: Final = f"wake.{GROUP}/"
"""And a model's name: on its TokenFactory, when requests for it last came while it slept (RFC 3339)."""
TEMPLATE_ANNOTATION: Final = f"{GROUP}/template"
"""On a pod: the digest of the template that it was made from."""
RAN_LABEL: Final = f"{GROUP}/ran-before"
"""On a workload whose pods are being replaced: how many replicas ran when that began."""
RESTORE_ANNOTATION: Final = f"{GROUP}/restore-from"
DELETION_COST: Final = "controller.kubernetes.io/pod-deletion-cost"
LWS_GROUP_LABEL: Final = "leaderworkerset.sigs.k8s.io/group-index"
LWS_WORKER_LABEL: Final = "leaderworkerset.sigs.k8s.io/worker-index"
GPU_RESOURCE: Final = "nvidia.com/gpu"
HOSTNAME_LABEL: Final = "kubernetes.io/hostname"
NIM_PORT: Final = 8000
CHECKPOINT_PORT: Final = 8011
START_GATE_PORT: Final = 9402
HEARTBEAT_PREFIX: Final = "tokenfactory-agent-"


def heartbeat_name(node: str) -> str:
    """The Lease that a node's agent renews."""
    return HEARTBEAT_PREFIX + node


def class_name(namespace: str, factory: str, model: str, product: str) -> str:
    return f"{namespace}/{factory}/{model}@{product}"


def idle_class(product: str) -> str:
    return f"idle@{product}"


def unmanaged_class(product: str) -> str:
    return f"unmanaged@{product}"


def class_product(name: str) -> str:
    return name.partition("@")[2]


@lru_cache(maxsize=4096)
def class_owner(name: str) -> tuple[str, str, str] | None:
    """(namespace, factory, model) of a factory's class; None for idle and unmanaged GPUs."""
    parts = name.partition("@")[0].split("/")
    return (parts[0], parts[1], parts[2]) if len(parts) == 3 else None
