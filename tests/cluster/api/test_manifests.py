"""What users write is taken or refused by the API server alone, and a refusal says what to write instead."""

from pathlib import Path

import pytest
import yaml
from tests.cluster.api.manifests import BAD, GOOD, Asking, changed

from tokenfactory.twin.cluster import Cluster

pytestmark = pytest.mark.cluster

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.parametrize("name", GOOD)
def test_a_good_object_is_taken(stored: dict, name: str):
    assert stored[name]["metadata"]["uid"]


def case_name(case: dict) -> str:
    return f"{case['of']}-{case.get('at', 'metadata.name')}-{case['says'][:40]}".replace(" ", "_")


@pytest.mark.parametrize("case", BAD, ids=case_name)
def test_a_bad_object_is_refused_with_what_to_write_instead(asking: Asking, stored: dict, case: dict):
    if "change" in case:
        body = changed(GOOD[case["of"]], case["change"])
        if "empty" in case:
            body["spec"][case["empty"]] = []
        status, answer = asking.would_create(body)
    elif "status" in case:
        status, answer = asking.would_update(stored[case["of"]] | {"status": case["status"]}, "/status")
    else:
        status, answer = asking.would_update(changed(stored[case["of"]], case["update"]))

    assert status in {400, 422}, f"taken, but should have said {case['says']!r}"
    assert case["says"] in answer["message"]
    if "at" in case:
        causes = answer["details"]["causes"]
        assert case["at"] in {cause["field"] for cause in causes}, causes


def test_no_refusal_is_a_rule_that_failed_to_evaluate(asking: Asking, stored: dict):
    """All rules run, also on text that another rule refuses: none may trip over it."""
    tripped = []
    for case in BAD:
        if "change" not in case or "timeZone" in str(case["change"]):
            continue
        body = changed(GOOD[case["of"]], case["change"])
        _, answer = asking.would_create(body)
        if " evaluating rule" in answer["message"] or "no such" in answer["message"]:
            tripped.append((case, answer["message"]))
    assert tripped == []


@pytest.mark.parametrize(
    ("of", "update"),
    [
        ("root", {"spec": {"limit": "200kW"}}),
        ("domain", {"spec": {"limit": "1kW"}}),  # below its fixed load, its grants and its timetable
        ("domain", {"spec": {"parent": "hall-b"}}),
        ("factory", {"spec": {"power": {"budget": "1W"}}}),
        ("sheet", {"spec": {"epoch": 11, "caps": [{"cap": 200000, "fallback": 200000}]}}),
        ("sheet", {"spec": {"term": 4}}),
        ("sheet", {"spec": {"earlier": None, "completeFrom": 9}}),
        ("renewal", {"spec": {"epoch": 21, "renewal": {"sequence": 101}}}),
        ("renewal", {"spec": {"epoch": 21, "term": 4, "renewal": {"sequence": 5000}}}),
        ("node", {"spec": {"term": 4, "fence": None, "path": ["a"], "formerPaths": [["bad-site"]]}}),
        ("node", {"spec": {"pods": [{"gpus": 20, "released": True}, {"gpus": 20}]}}),
        ("profile", {"spec": {"points": [{"tokensPerSecond": "0"}]}}),
        ("checkpoint", {"metadata": {"labels": {"a": "b"}}}),
    ],
)
def test_what_may_change_may_change(asking: Asking, stored: dict, of: str, update: dict):
    status, answer = asking.would_update(changed(stored[of], update))

    assert status == 200, answer


def test_a_fence_names_the_boot_that_it_ended(asking: Asking):
    """Without it a fence frees nothing, and whoever wrote it would wait for watts that do not come."""
    word = {"method": "Person", "by": "ada", "at": "2026-11-21T09:30:00Z"}
    node = asking.create({**GOOD["node"], "metadata": {"name": "bad-node-2"}, "spec": {"path": ["bad-site"]}})
    try:
        status, answer = asking.would_update(changed(node, {"spec": {"fence": {**word, "bootID": "boot-1"}}}))
        assert status == 422
        assert "never reported a boot: leave spec.fence.bootID out" in answer["message"]
        assert asking.would_update(changed(node, {"spec": {"fence": word}}))[0] == 200

        _, node = asking.update(changed(node, {"status": {"bootID": "boot-1"}}), "/status")
        for fence in (word, {**word, "bootID": "boot-0"}):
            status, answer = asking.would_update(changed(node, {"spec": {"fence": fence}}))
            assert status == 422
            assert "write spec.fence.bootID: boot-1" in answer["message"]
        status, node = asking.update(changed(node, {"spec": {"fence": {**word, "bootID": "boot-1"}}}))
        assert status == 200, node

        status, node = asking.update(changed(node, {"status": {"bootID": "boot-2"}}), "/status")
        assert status == 200, "a later boot reports, fence or not"
        assert asking.would_update(changed(node, {"spec": {"path": ["bad-site", "hall-a"]}}))[0] == 200
        assert asking.would_update(changed(node, {"spec": {"fence": None}}))[0] == 200
    finally:
        asking.delete(node)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_taken(asking: Asking, path: Path):
    for body in yaml.safe_load_all(path.read_text()):
        if body["kind"] == "Namespace":
            continue
        body["metadata"].pop("namespace", None)
        status, answer = asking.would_create(body)
        assert status == 201, answer


def test_every_example_is_listed_in_the_readme():
    listed = (EXAMPLES / "README.md").read_text()

    assert [path.name for path in EXAMPLES.glob("*.yaml") if f"[{path.name}]" not in listed] == []


def test_explain_reads_well(cluster: Cluster, crds: None):
    text = cluster.kubectl("explain", "tokenfactory.spec.models").stdout

    assert "watts are in the ledger" in " ".join(text.split())
    assert "nim\t<Object> -required-\n    The NVIDIA NIM image that serves it." in text


def test_the_short_names_and_the_category_work(cluster: Cluster, crds: None):
    for short in ("pd", "tf", "pp", "sheet", "gn", "ckpt"):
        # Not only is there something of that name (kubectl knows a `cs` by itself): it is ours.
        assert "GROUP:      tokenfactory.dev" in cluster.kubectl("explain", short).stdout
    kinds = cluster.kubectl("api-resources", "--categories=tokenfactory", "-o", "name").stdout.split()
    assert len(kinds) == 6


def test_only_a_cap_sheet_has_no_status_of_its_own(cluster: Cluster, crds: None):
    listed = cluster.request("GET", "/apis/tokenfactory.dev/v1alpha1")[1]["resources"]
    names = {entry["name"] for entry in listed}

    assert {name for name in names if "/" not in name and f"{name}/status" not in names} == {"capsheets"}
