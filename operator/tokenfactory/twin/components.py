"""What each component of a cluster is started with: flags and the few files that they read.

The flags are those of a real cluster where they decide what is allowed (RBAC, node authorizer,
NodeRestriction, audit), and tuned for two busy cores where they only cost: no fsync, no leader election
among one, no metrics of etcd, only the controllers that a cluster without a cloud needs.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tokenfactory.twin.pki import Authority, Pair

ISSUER = "https://kubernetes.default.svc.cluster.local"
_LOOPBACK = "127.0.0.1"

_CONTROLLERS = (
    "certificatesigningrequest-approving-controller",
    "certificatesigningrequest-cleaner-controller",
    "certificatesigningrequest-signing-controller",
    "clusterrole-aggregation-controller",
    "daemonset-controller",
    "deployment-controller",
    "disruption-controller",
    "endpointslice-controller",
    "garbage-collector-controller",
    "job-controller",
    "namespace-controller",
    "node-lifecycle-controller",
    "persistentvolume-binder-controller",
    "persistentvolume-protection-controller",
    "persistentvolumeclaim-protection-controller",
    "pod-garbage-collector-controller",
    "replicaset-controller",
    "resourcequota-controller",
    "root-ca-certificate-publisher-controller",
    "serviceaccount-controller",
    "statefulset-controller",
    "taint-eviction-controller",
    "validatingadmissionpolicy-status-controller",
)

# Who did what to which resource, and nothing of what was in it. The control plane's own traffic and
# answers about health would fill the log with what no test asks.
_AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "omitManagedFields": True,
    "rules": [
        {
            "level": "None",
            "users": ["system:apiserver", "system:kube-scheduler", "system:kube-controller-manager"],
        },
        {"level": "None", "userGroups": ["system:serviceaccounts:kube-system"]},
        {"level": "None", "nonResourceURLs": ["*"]},
        {"level": "Metadata"},
    ],
}


IDENTITIES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "admin": ("tokenfactory-admin", ("system:masters",)),
    "controller-manager": ("system:kube-controller-manager", ()),
    "scheduler": ("system:kube-scheduler", ()),
}
"""Who has a kubeconfig from the start: user and groups by its file's name."""


class ClusterError(RuntimeError):
    """The cluster cannot do this. The text says why and where to look."""


class AlreadyRunsError(ClusterError):
    """The folder's cluster runs, or is being started by somebody else."""


@dataclass(frozen=True)
class ClusterOptions:
    """What a cluster may differ in. The default is what most tests want."""

    scheduler: bool = True
    controller_manager: bool = True
    bind_address: str = _LOOPBACK
    """Where the API server listens. A real node's pods cannot reach loopback: give a bridge's address."""
    extra_addresses: tuple[str, ...] = ()
    """More addresses that the API server's certificate is good for, such as its Service's."""
    node_monitor_grace_seconds: int = 50
    """How long a node may be silent before it is NotReady. 50 is Kubernetes' own default."""
    audit_megabytes: int = 100
    """The most that the audit log takes, over all its files; the oldest entries go first."""
    extra_args: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """More flags by component; a flag given here wins over ours."""


@dataclass(frozen=True)
class Ports:
    """The loopback ports of one cluster, reserved for as long as it lives."""

    etcd: int
    etcd_peer: int
    apiserver: int


@dataclass(frozen=True)
class Plan:
    """Everything that the flags are made from."""

    folder: Path
    bin: Path
    options: ClusterOptions
    ports: Ports
    authority: Authority

    @property
    def host(self) -> str:
        return _LOOPBACK if self.options.bind_address == "0.0.0.0" else self.options.bind_address  # noqa: S104

    @property
    def server(self) -> str:
        return f"https://{self.host}:{self.ports.apiserver}"

    def kubeconfig(self, identity: str) -> Path:
        return self.folder / f"{identity}.kubeconfig"

    def argv(self, name: str, flags: Mapping[str, str | int | bool]) -> list[str]:
        own = [f"--{key}={_text(value)}" for key, value in flags.items()]
        return [str(self.bin / name), *own, *self.options.extra_args.get(name, ())]


def _text(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def etcd(plan: Plan) -> list[str]:
    pair = plan.authority.server("etcd", ("localhost",), (_LOOPBACK,))
    client = f"https://{_LOOPBACK}:{plan.ports.etcd}"
    peer = f"https://{_LOOPBACK}:{plan.ports.etcd_peer}"
    tls: dict[str, str | int | bool] = {}
    for prefix in ("", "peer-"):
        tls[f"{prefix}cert-file"] = str(pair.certificate)
        tls[f"{prefix}key-file"] = str(pair.key)
        tls[f"{prefix}trusted-ca-file"] = str(plan.authority.ca.certificate)
        tls[f"{prefix}client-cert-auth"] = True
    return plan.argv(
        "etcd",
        {
            "name": "twin",
            "data-dir": str(plan.folder / "etcd"),
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"twin={peer}",
            "socket-reuse-port": True,
            "unsafe-no-fsync": True,
            "quota-backend-bytes": 8 * 1024**3,
            "watch-progress-notify-interval": "5s",
            "log-level": "warn",
            **tls,
        },
    )


def apiserver(plan: Plan) -> list[str]:
    etcd_pair = plan.authority.server("etcd", ("localhost",), (_LOOPBACK,))
    serving = plan.authority.server(
        "kube-apiserver",
        ("localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"),
        tuple(dict.fromkeys((_LOOPBACK, plan.host, "10.96.0.1", *plan.options.extra_addresses))),
    )
    kubelet_client = plan.authority.client(
        "kubelet-client", "kube-apiserver-kubelet-client", ("system:masters",)
    )
    tokens = plan.authority.signing_key("service-account")
    policy = plan.folder / "audit-policy.yaml"
    policy.write_text(yaml.safe_dump(_AUDIT_POLICY))
    return plan.argv(
        "kube-apiserver",
        {
            "bind-address": plan.options.bind_address,
            "secure-port": plan.ports.apiserver,
            "permit-port-sharing": True,
            "advertise-address": plan.host,
            "endpoint-reconciler-type": "none",  # nothing reaches it through its Service
            "etcd-servers": f"https://{_LOOPBACK}:{plan.ports.etcd}",
            "etcd-cafile": str(plan.authority.ca.certificate),
            "etcd-certfile": str(etcd_pair.certificate),
            "etcd-keyfile": str(etcd_pair.key),
            "etcd-count-metric-poll-period": "0",
            "etcd-db-metric-poll-interval": "0",
            "tls-cert-file": str(serving.certificate),
            "tls-private-key-file": str(serving.key),
            "client-ca-file": str(plan.authority.ca.certificate),
            "kubelet-client-certificate": str(kubelet_client.certificate),
            "kubelet-client-key": str(kubelet_client.key),
            "kubelet-preferred-address-types": "InternalIP",
            "authorization-mode": "Node,RBAC",
            "enable-admission-plugins": "NodeRestriction",
            "allow-privileged": True,
            "service-cluster-ip-range": "10.96.0.0/16",
            "service-account-issuer": ISSUER,
            "service-account-key-file": str(tokens.certificate),
            "service-account-signing-key-file": str(tokens.key),
            "service-account-extend-token-expiration": False,
            "profiling": False,
            "enable-logs-handler": False,
            "shutdown-send-retry-after": False,
            "audit-policy-file": str(policy),
            "audit-log-path": str(plan.folder / "audit" / "audit.log"),
            "audit-log-maxsize": max(1, plan.options.audit_megabytes // 4),
            "audit-log-maxbackup": 3,
        },
    )


def controller_manager(plan: Plan) -> list[str]:
    ca, tokens = plan.authority.ca, plan.authority.signing_key("service-account")
    return plan.argv(
        "kube-controller-manager",
        {
            "kubeconfig": str(plan.kubeconfig("controller-manager")),
            "secure-port": 0,
            "leader-elect": False,
            "use-service-account-credentials": True,
            "controllers": ",".join(_CONTROLLERS),
            "root-ca-file": str(ca.certificate),
            "service-account-private-key-file": str(tokens.key),
            "cluster-signing-cert-file": str(ca.certificate),
            "cluster-signing-key-file": str(ca.key),
            "node-monitor-grace-period": f"{plan.options.node_monitor_grace_seconds}s",
            "kube-api-qps": 300,
            "kube-api-burst": 600,
            "profiling": False,
        },
    )


def scheduler(plan: Plan) -> list[str]:
    config = plan.folder / "scheduler.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "kubescheduler.config.k8s.io/v1",
                "kind": "KubeSchedulerConfiguration",
                "leaderElection": {"leaderElect": False},
                "clientConnection": {
                    "kubeconfig": str(plan.kubeconfig("scheduler")),
                    "qps": 500,
                    "burst": 1000,
                },
                "enableProfiling": False,
            }
        )
    )
    return plan.argv("kube-scheduler", {"config": str(config), "secure-port": 0})


def kubeconfig(server: str, authority: Authority, user: dict[str, object], namespace: str = "default") -> str:
    """A kubeconfig that stands alone: it holds its certificates instead of pointing at files."""
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": "tokenfactory",
                    "cluster": {
                        "server": server,
                        "certificate-authority-data": encoded(authority.ca.certificate),
                    },
                }
            ],
            "users": [{"name": "user", "user": user}],
            "contexts": [
                {
                    "name": "tokenfactory",
                    "context": {"cluster": "tokenfactory", "user": "user", "namespace": namespace},
                }
            ],
            "current-context": "tokenfactory",
        }
    )


def certificate_user(pair: Pair) -> dict[str, object]:
    return {"client-certificate-data": encoded(pair.certificate), "client-key-data": encoded(pair.key)}


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
