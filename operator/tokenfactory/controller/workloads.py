"""What a model becomes in Kubernetes: a Deployment whose pods wait behind the power gate, and a Service.

Only fields that this product decides are in these objects. They are applied server-side, so what others set
beside them (an annotation, a sidecar injected at admission, an HPA's label) stays theirs.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final

import msgspec

from tokenfactory.api import names
from tokenfactory.api.meta import GROUP
from tokenfactory.api.quantities import parse_duration
from tokenfactory.api.token_factory import ModelSpec, TokenFactory
from tokenfactory.controller.objects import Deployment, LeaderWorkerSet, Service, says
from tokenfactory.kube.objects import Pod

Object = dict[str, Any]

CACHE_PATH: Final = "/opt/nim/.cache"
STORE_PATH: Final = "/checkpoints"
MODEL_CONTAINER: Final = "nim"
SPEC_LABEL: Final = f"{GROUP}/spec"
"""On what we apply: the digest of the spec that we applied."""
_SECURITY: Final[Object] = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


_GROUP_NAME_LENGTH: Final = 42

_NOT_ROOT: Final[Object] = {"runAsNonRoot": True, "runAsUser": 1000}


RESTART_FEATURE: Final = "RestartAllContainersOnContainerExits"
"""As a kubelet declares that it can do the following."""
THROUGH_THE_GATE: Final[Object] = {
    "restartPolicy": "Always",
    "restartPolicyRules": [
        {"action": "RestartAllContainers", "exitCodes": {"operator": "NotIn", "values": []}},
    ],
}
"""P3: whenever this container ends, the init containers run again before it does (Kubernetes 1.36 and later)."""
RESTART_PROBE: Final[Object] = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"generateName": "tokenfactory-asks-"},
    "spec": {
        "selector": {"matchLabels": {"app": "tokenfactory-asks"}},
        "template": {
            "metadata": {"labels": {"app": "tokenfactory-asks"}},
            "spec": {"containers": [{"name": "none", "image": "none", **THROUGH_THE_GATE}]},
        },
    },
}
"""Created as a dry run: an API server that knows such rules says them back, an older one drops or refuses them."""


class WorkloadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the installation decides for every workload."""

    image: str
    """Our own image: the init containers that wait for the cap and restore a checkpoint."""
    image_pull_policy: str = "IfNotPresent"
    start_gate_port: int = names.START_GATE_PORT
    restart_through_gate: bool = False
    """The API server knows `THROUGH_THE_GATE`; where it does not, a wish for it would never come true."""


def workload_name(factory: TokenFactory, model: ModelSpec) -> str:
    return workload_called(factory.metadata.name, model.name)


def workload_called(factory: str, model: str) -> str:
    """Not unambiguous: `a-b` with model `c` and `a` with model `b-c` are called alike (see `serving`)."""
    return f"{factory}-{model}"


def group_name(factory: TokenFactory, model: ModelSpec) -> str:
    """Of a LeaderWorkerSet. Its controller makes a headless Service of that name, by which the pods of a group find
    each other: it must not be the name of the Service that answers requests. The StatefulSet of a group's workers is
    called like it and the group's number, and what Kubernetes appends to that must fit in a label.
    """
    return group_called(factory.metadata.name, model.name)


def group_called(factory: str, model: str) -> str:
    name = workload_called(factory, model)
    if len(name) > _GROUP_NAME_LENGTH:
        digest = hashlib.sha256(name.encode()).hexdigest()[:6]
        name = f"{name[: _GROUP_NAME_LENGTH - 7]}-{digest}"
    return f"{name}-group"


def workload_labels(factory: TokenFactory, model: ModelSpec) -> dict[str, str]:
    return {names.FACTORY_LABEL: factory.metadata.name, names.MODEL_LABEL: model.name}


def deployment(
    factory: TokenFactory, model: ModelSpec, replicas: int, options: WorkloadOptions, ran: int | None = None
) -> Object:
    """No surge: a rollout never needs watts for an old and a new replica at once. A quarter at a time is replaced: of
    those that `ran` when it began, if these were fewer than are asked for.
    """
    labels = workload_labels(factory, model)
    pod = _pod_spec(factory, model, options)
    if options.restart_through_gate:
        # A group of pods needs no such rule: it starts anew as new pods.
        pod["containers"][0] |= THROUGH_THE_GATE
    spec: Object = {
        "replicas": replicas,
        "revisionHistoryLimit": 3,
        "progressDeadlineSeconds": 3600,
        "selector": {"matchLabels": labels},
        "strategy": {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxSurge": 0, "maxUnavailable": _unavailable(replicas, ran)},
        },
        "template": _template(labels, pod, _digest(pod)),
    }
    return _owned("apps/v1", "Deployment", workload_name(factory, model), factory, model, spec, ran)


def _unavailable(replicas: int, ran: int | None) -> str | int:
    if ran is None or ran >= replicas:
        return "25%"
    return replicas - ran + min(max(ran // 4, 1), ran)


def leader_worker_set(
    factory: TokenFactory, model: ModelSpec, replicas: int, options: WorkloadOptions, ran: int | None = None
) -> Object:
    """A replica is a group of pods on as many nodes; a group that loses a pod starts anew as a whole. No surge."""
    labels = workload_labels(factory, model)
    leader, worker = (_pod_spec(factory, model, options) for _ in range(2))
    for spec, role in ((leader, "1"), (worker, "0")):
        nim = spec["containers"][0]
        theirs = {variable["name"] for variable in nim["env"]}
        nim["env"] += [each for each in _multi_node_env(model, role) if each["name"] not in theirs]
    # Only the leader answers requests.
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        worker["containers"][0].pop(probe)
    digest = _digest([leader, worker])
    return _owned(
        "leaderworkerset.x-k8s.io/v1",
        "LeaderWorkerSet",
        group_name(factory, model),
        factory,
        model,
        {
            "replicas": replicas,
            "startupPolicy": "LeaderCreated",
            "rolloutStrategy": {
                "type": "RollingUpdate",
                "rollingUpdateConfiguration": {
                    "maxSurge": 0,
                    "maxUnavailable": 1 if ran is None or ran >= replicas else replicas - ran + 1,
                },
            },
            "leaderWorkerTemplate": {
                "size": model.nodes_per_replica,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": _template(labels, leader, digest),
                "workerTemplate": _template(labels, worker, digest),
            },
        },
        ran,
    )


def service(factory: TokenFactory, model: ModelSpec) -> Object:
    selector = workload_labels(factory, model)
    if model.nodes_per_replica > 1:
        selector |= {names.LWS_WORKER_LABEL: "0"}
    spec: Object = {
        "selector": selector,
        "ports": [{"name": "http", "port": names.NIM_PORT, "targetPort": "http", "protocol": "TCP"}],
    }
    return _owned("v1", "Service", workload_name(factory, model), factory, model, spec)


def restarts_through_gate(held: Deployment) -> bool:
    """Does it ask for `THROUGH_THE_GATE`?"""
    template = held.spec.get("template") or {}
    containers = (template.get("spec") or {}).get("containers") or ()
    return any(container.get("restartPolicyRules") for container in containers)


def asks_for_rule(pod: Pod) -> bool:
    """The same of a pod."""
    return any(
        rule.action == "RestartAllContainers"
        for container in pod.spec.containers
        for rule in container.restart_policy_rules
    )


def is_as(held: Deployment | LeaderWorkerSet | Service, wanted: Object) -> bool:
    """Does the object say all that we want of it, and whose it is, and was it last applied with just that?

    The first sees what others changed. Only the last sees a field that we wanted once and want no more.
    """
    ours = wanted["metadata"]
    owned = {owner["uid"] for owner in ours["ownerReferences"]} <= {
        owner.uid for owner in held.metadata.owner_references
    }
    applied = all(
        held.metadata.labels.get(label) == ours["labels"].get(label)
        for label in (SPEC_LABEL, names.RAN_LABEL)
    )
    return owned and applied and says(held.spec, wanted["spec"])


def template_digest(wanted: Object) -> str:
    """What the pods of such a workload bear once they are all of it (`TEMPLATE_ANNOTATION`)."""
    return template_of(wanted["spec"])


def template_of(spec: Object) -> str:
    """The same of a workload as it is: empty where somebody else, or an earlier version, made it."""
    groups = spec.get("leaderWorkerTemplate") or {}
    template = spec.get("template") or groups.get("leaderTemplate") or {}
    annotations = (template.get("metadata") or {}).get("annotations") or {}
    return str(annotations.get(names.TEMPLATE_ANNOTATION, ""))


def _template(labels: Object, pod: Object, digest: str) -> Object:
    return {"metadata": {"labels": labels, "annotations": {names.TEMPLATE_ANNOTATION: digest}}, "spec": pod}


def _digest(part: Any) -> str:
    return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16]


def _owned(
    api_version: str,
    kind: str,
    name: str,
    factory: TokenFactory,
    model: ModelSpec,
    spec: Object,
    ran: int | None = None,
) -> Object:
    labels = {SPEC_LABEL: _digest(spec)}
    if ran is not None:
        labels[names.RAN_LABEL] = str(ran)
    metadata = _metadata(name, factory, model, labels)
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, "spec": spec}


def _metadata(name: str, factory: TokenFactory, model: ModelSpec, labels: dict[str, str]) -> Object:
    return {
        "name": name,
        "namespace": factory.metadata.namespace,
        "labels": workload_labels(factory, model) | labels,
        "ownerReferences": [
            {
                "apiVersion": factory.api_version,
                "kind": TokenFactory.KIND,
                "name": factory.metadata.name,
                "uid": factory.metadata.uid,
                "controller": True,
                "blockOwnerDeletion": False,
            }
        ],
    }


def _pod_spec(factory: TokenFactory, model: ModelSpec, options: WorkloadOptions) -> Object:
    spec: Object = {
        "schedulingGates": [{"name": names.GATE}],
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 60,
        "nodeSelector": dict(factory.spec.node_selector),
        "tolerations": [
            {"key": names.GPU_RESOURCE, "operator": "Exists"},
            {"key": names.MANAGED_TAINT, "operator": "Exists"},
        ],
        # A wish: the operator's own choice of the node spreads replicas, and narrows the affinity to that node.
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": key,
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": workload_labels(factory, model)},
            }
            for key in ("topology.kubernetes.io/zone", names.HOSTNAME_LABEL)
        ],
        "securityContext": {"fsGroup": 1000, "fsGroupChangePolicy": "OnRootMismatch"},
        "initContainers": _init_containers(factory, model, options),
        "containers": [_nim_container(model)],
        "volumes": _volumes(model),
    }
    if model.nim.pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in model.nim.pull_secrets]
    return spec


def wait_cap(options: WorkloadOptions) -> Object:
    """P3: this container ends once the pod's GPUs are read back at their caps."""
    return _ours(options) | {
        "name": "wait-cap",
        "args": ["wait-cap", f"--port={options.start_gate_port}"],
        "env": [_downward("NODE_IP", "status.hostIP"), _downward("POD_UID", "metadata.uid")],
    }


def _ours(options: WorkloadOptions) -> Object:
    return {
        "image": options.image,
        "imagePullPolicy": options.image_pull_policy,
        "securityContext": _SECURITY | _NOT_ROOT,
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "512Mi"}},
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def _init_containers(factory: TokenFactory, model: ModelSpec, options: WorkloadOptions) -> list[Object]:
    """P3: the cap is read back before anything else runs; then the cache is restored, and kept saved."""
    ours = _ours(options)
    containers = [wait_cap(options)]
    if not _saves(model):
        return containers
    mounts = [{"name": "cache", "mountPath": CACHE_PATH}, {"name": "checkpoints", "mountPath": STORE_PATH}]
    identity = _identity_args(factory, model)
    containers.append(
        ours
        | {
            "name": "restore",
            "args": ["checkpoint", "restore", f"--cache={CACHE_PATH}", f"--store={STORE_PATH}", *identity],
            "env": [_downward("RESTORE_FROM", f"metadata.annotations['{names.RESTORE_ANNOTATION}']")],
            "volumeMounts": mounts,
        }
    )
    every = parse_duration(model.checkpoint.every) // 1000
    containers.append(
        ours
        | {
            "name": "capture",
            "restartPolicy": "Always",
            "args": [
                "checkpoint",
                "keep",
                f"--cache={CACHE_PATH}",
                f"--store={STORE_PATH}",
                f"--every-seconds={every}",
                f"--keep={model.checkpoint.keep}",
                f"--port={names.CHECKPOINT_PORT}",
                *identity,
            ],
            "env": [_downward("POD_IP", "status.podIP")],
            "ports": [{"name": "checkpoint", "containerPort": names.CHECKPOINT_PORT}],
            "volumeMounts": mounts,
        }
    )
    return containers


def _nim_container(model: ModelSpec) -> Object:
    env: list[Object] = [{"name": "NIM_CACHE_PATH", "value": CACHE_PATH}]
    if model.nim.auth_secret:
        reference = {"name": model.nim.auth_secret, "key": "NGC_API_KEY"}
        env.append({"name": "NGC_API_KEY", "valueFrom": {"secretKeyRef": reference}})
    if model.nim.profile:
        env.append({"name": "NIM_MODEL_PROFILE", "value": model.nim.profile})
    env += [{"name": variable.name, "value": variable.value} for variable in model.nim.env]
    return {
        "name": MODEL_CONTAINER,
        "image": model.nim.image,
        "env": env,
        "ports": [{"name": "http", "containerPort": names.NIM_PORT}],
        "resources": {"limits": {names.GPU_RESOURCE: str(model.gpus_per_replica)}},
        "securityContext": _SECURITY if model.nim.run_as_root else _SECURITY | _NOT_ROOT,
        "startupProbe": _probe("/v1/health/ready", period=10, failures=120, delay=30),
        "readinessProbe": _probe("/v1/health/ready", period=5, failures=3),
        "livenessProbe": _probe("/v1/health/live", period=10, failures=6),
        "volumeMounts": [
            {"name": "cache", "mountPath": CACHE_PATH},
            {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108 - NCCL's shared memory in the pod
        ],
    }


def _volumes(model: ModelSpec) -> list[Object]:
    volumes: list[Object] = [
        {"name": "cache", "emptyDir": {}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
    ]
    if _saves(model):
        volumes.append(
            {"name": "checkpoints", "persistentVolumeClaim": {"claimName": model.checkpoint.claim}}
        )
    return volumes


def _saves(model: ModelSpec) -> bool:
    return model.checkpoint.claim is not None


def _identity_args(factory: TokenFactory, model: ModelSpec) -> list[str]:
    """What a restored cache must have been made for; the product is added where the container runs."""
    facts = {
        "factory": f"{factory.metadata.namespace}/{factory.metadata.name}",
        "model": model.name,
        "image": model.nim.image,
        "profile": model.nim.profile or "",
        "gpus": str(model.gpus_per_replica),
    }
    return [f"--identity={key}={value}" for key, value in sorted(facts.items())]


def _multi_node_env(model: ModelSpec, role: str) -> list[Object]:
    """As NIM's images want to be told of their group; the leader's address comes from the LeaderWorkerSet controller.

    A profile says itself how the model is split.
    """
    split = {
        "NIM_TENSOR_PARALLEL_SIZE": str(model.gpus_per_replica),
        "NIM_PIPELINE_PARALLEL_SIZE": str(model.nodes_per_replica),
    }
    values = {
        "NIM_MULTI_NODE": "1",
        "NIM_NUM_COMPUTE_NODES": str(model.nodes_per_replica),
        "NIM_LEADER_ROLE": role,
        **({} if model.nim.profile else split),
    }
    env: list[Object] = [{"name": name, "value": value} for name, value in values.items()]
    return [*env, _downward("NIM_NODE_RANK", f"metadata.labels['{names.LWS_WORKER_LABEL}']")]


def _downward(name: str, path: str) -> Object:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _probe(path: str, *, period: int, failures: int, delay: int = 0) -> Object:
    return {
        "httpGet": {"path": path, "port": "http"},
        "periodSeconds": period,
        "failureThreshold": failures,
        "timeoutSeconds": 5,
        "initialDelaySeconds": delay,
    }
