"""How a GPUNode's spec may change, so that at every instant the present spec covers every older one.

An agent may still be reading an older spec. So nothing that it may be using leaves the spec before its status says
that it has seen a spec without it: a pod is first marked released, a path first becomes a former path.
"""

from __future__ import annotations

import msgspec

from tokenfactory.api.gpu_node import GPUNode, GPUNodeSpec, PodGrant
from tokenfactory.planning.power.lines import NodeFacts, is_fenced

MOST_FORMER_PATHS = 4


def is_current(node: GPUNode) -> bool:
    """The agent has reported that it obeys the spec as it stands."""
    return node.status.observed_generation == node.metadata.generation


def granted(node: GPUNode, grant: PodGrant) -> GPUNodeSpec:
    """With one more pod. Ask `Ledger.admit` first; the pod's gate goes only after this is written.

    A pod's class and number of GPUs never change: another class needs another pod.
    """
    others = tuple(pod for pod in node.spec.pods if pod.uid != grant.uid)
    return msgspec.structs.replace(node.spec, pods=(*others, grant))


def released(node: GPUNode, uid: str) -> GPUNodeSpec:
    """With this pod on its way out: it may no longer start, and stays charged."""
    pods = tuple(
        msgspec.structs.replace(pod, released=True) if pod.uid == uid else pod for pod in node.spec.pods
    )
    return msgspec.structs.replace(node.spec, pods=pods)


def collected(node: GPUNode, facts: NodeFacts) -> GPUNodeSpec:
    """Without the released pods that can no longer be running here.

    Either the agent has said, knowing that they were released, that no GPU is held by them, or the node is fenced.
    """
    if is_fenced(node, facts):
        gone = {pod.uid for pod in node.spec.pods if pod.released}
    elif is_current(node):
        held = {gpu.pod_uid for gpu in node.status.gpus}
        gone = {pod.uid for pod in node.spec.pods if pod.released and pod.uid not in held}
    else:
        gone = set()
    return msgspec.structs.replace(
        node.spec, pods=tuple(pod for pod in node.spec.pods if pod.uid not in gone)
    )


def moved(node: GPUNode, path: tuple[str, ...]) -> GPUNodeSpec | None:
    """On another path, with the old one still obeyed and charged. None: the agent must report first.

    A domain that the node left and comes back to must not be credited with what was acknowledged there before:
    the agent might be reading the spec in between, which does not name it. So the path changes only when the agent
    is known to have read the last change.
    """
    spec = node.spec
    if path == spec.path:
        return spec
    if not spec.path:
        return msgspec.structs.replace(spec, path=path)
    former = tuple(dict.fromkeys((*spec.former_paths, spec.path)))
    former = tuple(old for old in former if old != path)
    listed = {domain for old in (spec.path, *spec.former_paths) for domain in old}
    returning = {entry.domain for entry in node.status.applied} & set(path) - listed
    if len(former) > MOST_FORMER_PATHS or (returning and not is_current(node)):
        return None
    return msgspec.structs.replace(spec, path=path, former_paths=former)


def settled_path(node: GPUNode) -> GPUNodeSpec:
    """Without the former paths, once the agent has acknowledged a sheet of every domain on the new one.

    That may raise what the node draws: ask `Ledger.admit_spec` first.
    """
    acked = {entry.domain for entry in node.status.applied if entry.epoch}
    if is_current(node) and acked.issuperset(node.spec.path):
        return msgspec.structs.replace(node.spec, former_paths=())
    return node.spec
