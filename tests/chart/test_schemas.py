"""kubeconform over everything that the chart can render, with the schemas of the API server that we build.

Without this a field that a Kubernetes kind does not have would only be seen by those who switch that part on.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.chart.helm import Helm

from tokenfactory.twin.cluster import Cluster
from tokenfactory.twin.toolchain import ensure_kubeconform

pytestmark = pytest.mark.cluster

KIND = "x-kubernetes-group-version-kind"


def strict(schema: Any) -> Any:
    """A field that is not in the schema is an error; int-or-string is what it says."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("format") == "int-or-string":
        return {"type": ["integer", "string"]}
    said = {name: strict(inner) for name, inner in schema.items()}
    if isinstance(said.get("properties"), dict) and "additionalProperties" not in said:
        said["additionalProperties"] = False
    return said


@pytest.fixture(scope="module")
def schemas(cluster: Cluster, crds: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file per kind, from the server's own OpenAPI."""
    folder = tmp_path_factory.mktemp("schemas")
    definitions = strict(cluster.request("GET", "/openapi/v2")[1]["definitions"])
    whole = folder / "definitions.json"
    whole.write_text(json.dumps({"definitions": definitions}))
    for name, definition in definitions.items():
        for kind in definition.get(KIND, ()):
            group = kind["group"].split(".")[0]
            file = "-".join(part for part in (kind["kind"], group, kind["version"]) if part).lower()
            (folder / f"{file}.json").write_text(json.dumps({"$ref": f"{whole}#/definitions/{name}"}))
    return folder


def conform(schemas: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    location = f"{schemas}/{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json"
    return subprocess.run(
        [str(ensure_kubeconform()), "-schema-location", location, "-summary", *options],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "values",
    [
        (),
        ("operator.replicas=2", "agent.privileged=true", "agent.runtimeClassName="),
        ("monitoring.rules=PrometheusRule", "monitoring.podMonitors=true", "leaderWorkerSets.enabled=true"),
        (
            'imagePullSecrets=[{"name":"registry"}]',
            'operator.tolerations=[{"operator":"Exists"}]',
            'operator.nodeSelector={"a":"b"}',
            'operator.affinity={"podAntiAffinity":{}}',
        ),
    ],
    ids=lambda values: ",".join(value.split("=")[0] for value in values) or "defaults",
)
def test_every_object_conforms(helm: Helm, schemas: Path, values: tuple[str, ...]):
    # The kinds of the Prometheus operator are not the API server's; the chart's own CRDs are tried by installing them.
    done = conform(
        schemas, helm.template(*values), "-skip", "PrometheusRule,PodMonitor,CustomResourceDefinition"
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Invalid: 0, Errors: 0" in done.stdout


def test_a_field_that_does_not_exist_is_seen(helm: Helm, schemas: Path):
    text = helm.template().replace("hostNetwork: true", "hostNetworks: true")

    done = conform(schemas, text, "-skip", "CustomResourceDefinition")

    assert done.returncode == 1
    assert "hostNetworks" in done.stdout


def test_the_examples_conform(schemas: Path):
    folder = Path(__file__).parents[2] / "examples"

    done = conform(schemas, "\n---\n".join(path.read_text() for path in sorted(folder.glob("*.yaml"))))

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Skipped: 0" in done.stdout
