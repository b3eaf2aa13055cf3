"""What may be set in the chart, what not, and what comes of it."""

import pytest
from tests.chart.helm import CHART, ROOT, Helm, HelmError, one

from tokenfactory.api import crd
from tokenfactory.api.names import HEARTBEAT_PREFIX, START_GATE_PORT

pytestmark = pytest.mark.cluster

GOOD = [
    (),
    ("operator.replicas=2",),
    ("agent.enabled=false",),
    ("agent.privileged=true", "agent.runtimeClassName="),
    ("agent.maxUnavailable=3",),
    ('agent.maxUnavailable="25%"',),
    ("crds.install=false",),
    (
        "monitoring.rules=PrometheusRule",
        "monitoring.podMonitors=true",
        'monitoring.ruleLabels={"release":"prom"}',
    ),
    ("monitoring.rules=None",),
    ("leaderWorkerSets.enabled=true",),
    ("agent.nodePower.source=Hwmon",),
    ("agent.nodePower.source=Hwmon", "agent.nodePower.from=/sys/class/hwmon/hwmon3/power1_average"),
    (
        "agent.nodePower.source=Redfish",
        "agent.nodePower.from=http://169.254.3.254/redfish/v1/Chassis/1/Power",
    ),
    (
        "agent.nodePower.source=Redfish",
        "agent.nodePower.from=https://{node}-bmc.example/redfish/v1/Chassis/1/EnvironmentMetrics",
        "agent.nodePower.secret=bmc",
        "agent.nodePower.verify=false",
    ),
    ("image.digest=sha256:" + "0" * 64, 'imagePullSecrets=[{"name":"registry"}]'),
    (
        'operator.tolerations=[{"operator":"Exists"}]',
        'operator.nodeSelector={"a":"b"}',
        'operator.affinity={"podAntiAffinity":{}}',
    ),
]

BAD = [
    ("operator.replicas=3", "maximum"),
    ("operator.replicas=0", "minimum"),
    ("operator.replica=1", "replica"),
    ("operator.leaseSeconds=1", "minimum"),
    ("image.tag=latest", "tag"),
    ("image.digest=sha256:12", "pattern"),
    ("image.repository=", "repository"),
    ("image.pullPolicy=Sometimes", "pullPolicy"),
    ('imagePullSecrets=["registry"]', "imagePullSecrets"),
    ("agent.startGatePort=80", "minimum"),
    ("agent.heartbeatSeconds=600", "maximum"),
    ("agent.podResources=var/lib", "pattern"),
    ('agent.maxUnavailable="0%"', "pattern"),
    ("agent.enabled=sometimes", "enabled"),
    ("agent.nodePower.source=IPMI", "source"),
    ("agent.nodePower.source=Redfish", "from"),
    ("agent.nodePower.from=hwmon3", "from"),
    ("agent.nodePower.secret=BMC Secret", "secret"),
    ('agent.nodeSelector={"gpu":true}', "gpu"),
    ("monitoring.rules=Always", "rules"),
    ("monitoring.runbookUrl=runbooks", "runbookUrl"),
    ("admissionPolicy=false", "admissionPolicy"),
    ("agents.enabled=false", "agents"),
]


@pytest.mark.parametrize("values", GOOD, ids=lambda values: ",".join(values) or "defaults")
def test_good_values_pass_lint(helm: Helm, values: tuple[str, ...]):
    assert "0 chart(s) failed" in helm.lint(*values)


@pytest.mark.parametrize(("value", "named"), BAD)
def test_bad_values_are_refused_by_name(helm: Helm, value: str, named: str):
    with pytest.raises(HelmError) as refused:
        helm.template(value)

    assert value.split("=", maxsplit=1)[0].split(".", maxsplit=1)[0] in str(refused.value)
    assert named in str(refused.value)


def test_the_crds_come_with_it_and_stay_behind_it(render):
    kinds = [body for body in render() if body["kind"] == "CustomResourceDefinition"]

    assert {body["metadata"]["name"] for body in kinds} == {
        crd.crd(kind)["metadata"]["name"] for kind in crd.KINDS
    }
    assert {body["metadata"]["annotations"]["helm.sh/resource-policy"] for body in kinds} == {"keep"}
    assert not [body for body in render("crds.install=false") if body["kind"] == "CustomResourceDefinition"]


def test_operator_and_agents_agree_on_the_start_gate(render):
    objects = render("agent.startGatePort=9999")

    for kind in ("Deployment", "DaemonSet"):
        args = one(objects, kind)["spec"]["template"]["spec"]["containers"][0]["args"]
        assert "--start-gate-port=9999" in args
    default = one(render(), "DaemonSet")["spec"]["template"]["spec"]["containers"][0]["args"]
    assert f"--start-gate-port={START_GATE_PORT}" in default


def test_what_the_workloads_are_started_with_is_what_the_commands_know(render):
    import typer.main

    from tokenfactory.cli.main import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    redfish = (
        "agent.nodePower.source=Redfish",
        "agent.nodePower.from=https://b/x",
        "agent.nodePower.secret=bmc",
        "agent.nodePower.verify=false",
    )
    for values in ((), ("operator.taintNodes=false",), redfish):
        objects = render(*values)
        for kind in ("Deployment", "DaemonSet"):
            name, *options = one(objects, kind)["spec"]["template"]["spec"]["containers"][0]["args"]
            known = {text for it in commands[name].params for text in (*it.opts, *it.secondary_opts)}
            assert {option.split("=")[0] for option in options} <= known


def test_the_bmcs_secret_is_mounted_where_the_agent_looks_for_it(render):
    def agent(*values: str) -> dict:
        return one(render(*values), "DaemonSet")["spec"]["template"]["spec"]

    assert "node-power" not in str(agent())
    pod = agent(
        "agent.nodePower.source=Redfish",
        "agent.nodePower.from=https://b/{node}",
        "agent.nodePower.secret=bmc",
    )
    args, mounts = pod["containers"][0]["args"], pod["containers"][0]["volumeMounts"]
    assert args[-3:] == [
        "--node-power=redfish",
        "--node-power-from=https://b/{node}",
        "--node-power-credentials=/bmc",
    ]
    assert {"name": "bmc", "mountPath": "/bmc", "readOnly": True} in mounts
    assert {"name": "bmc", "secret": {"secretName": "bmc", "defaultMode": 0o400}} in pod["volumes"]


def test_an_agent_is_sent_away_from_a_node_whose_driver_is_to_be_replaced(render):
    pod = one(render(), "DaemonSet")["spec"]["template"]["spec"]
    terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = terms["nodeSelectorTerms"]
    assert term["matchExpressions"] == [
        {"key": "tokenfactory.dev/agent", "operator": "NotIn", "values": ["paused"]}
    ]
    assert {"operator": "Exists"} in pod["tolerations"]


def test_the_heartbeats_name_in_the_policy_is_the_one_that_agents_use(render):
    policies = [each for each in render() if each["kind"] == "ValidatingAdmissionPolicy"]
    (policy,) = [each for each in policies if each["metadata"]["name"] == "tokenfactory-agent"]

    assert f"'{HEARTBEAT_PREFIX}' + variables.node" in str(policy["spec"]["validations"])


def test_only_the_operator_alone_has_a_liveness_probe(render):
    """A second replica waits for the Lease and answers nothing meanwhile: a probe would kill it for that."""

    def container(*values: str) -> dict:
        return one(render(*values), "Deployment")["spec"]["template"]["spec"]["containers"][0]

    assert "livenessProbe" in container()
    assert "livenessProbe" not in container("operator.replicas=2")


def test_nobody_reads_secrets_and_agents_read_no_pods(render):
    rules = {
        (body["metadata"]["name"], resource): rule["verbs"]
        for body in render()
        if body["kind"] in {"ClusterRole", "Role"}
        for rule in body["rules"]
        for resource in rule["resources"]
    }

    assert not [key for key in rules if key[1] in {"secrets", "*"}]
    assert not [verbs for verbs in rules.values() if "*" in verbs]
    assert {resource for name, resource in rules if name.endswith("-agent")} == {
        "capsheets",
        "gpunodes",
        "gpunodes/status",
        "leases",
    }


def test_every_alert_has_its_runbook_page(render):
    import yaml

    text = one(render("monitoring.runbookUrl=https://example.dev/r"), "ConfigMap", "-rules")["data"][
        "power.yaml"
    ]
    alerts = [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"] if "alert" in rule]

    assert alerts
    for alert in alerts:
        assert alert["annotations"]["runbook_url"] == f"https://example.dev/r/{alert['alert']}.md"
        assert (
            (ROOT / "docs" / "runbooks" / f"{alert['alert']}.md")
            .read_text()
            .startswith(f"# {alert['alert']}\n")
        )
        assert {"summary", "description"} <= alert["annotations"].keys()
        assert "$" not in alert["annotations"]["summary"]
        assert alert["labels"]["severity"] in {"critical", "warning", "info"}


def test_the_chart_ships_nothing_but_itself():
    top = {path.name for path in CHART.iterdir()}

    assert top == {"Chart.yaml", "values.yaml", "values.schema.json", ".helmignore", "templates", "files"}
