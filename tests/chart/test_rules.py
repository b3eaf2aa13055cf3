"""Alerts fire when they must and stay silent when they must not: promtool over the rules as the chart renders them."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from tests.chart.helm import one

from tokenfactory.twin.toolchain import ensure_promtool

pytestmark = pytest.mark.cluster

HERE = Path(__file__).parent


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(
        [str(ensure_promtool()), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def rules(render, tmp_path: Path) -> Path:
    path = tmp_path / "rules.yaml"
    path.write_text(one(render(), "ConfigMap", "-rules")["data"]["power.yaml"])
    return path


def test_the_rules_are_well_formed(rules: Path):
    assert "3 rules found" in promtool("check", "rules", rules)


def test_alerts_fire_and_stay_silent(rules: Path):
    shutil.copy(HERE / "power.test.yaml", rules.parent)

    promtool("test", "rules", rules.parent / "power.test.yaml")


@pytest.mark.parametrize(
    ("alert", "as_it_is", "never"),
    [
        ("TokenFactoryChargeOverLimit", "_charge_watts >", "_charge_watts > 10 *"),
        ("TokenFactoryNodeAboveCharge", '"AboveCharge"} ==', '"AboveCharge"} == 2 *'),
        ("TokenFactoryNodeMeterSilent", '"Unreadable"} ==', '"Silent"} =='),
    ],
)
def test_the_trial_itself_notices_a_rule_that_never_fires(rules: Path, alert: str, as_it_is: str, never: str):
    text = rules.read_text()
    assert text.count(as_it_is) == 1
    rules.write_text(text.replace(as_it_is, never))
    shutil.copy(HERE / "power.test.yaml", rules.parent)

    with pytest.raises(AssertionError, match=alert):
        promtool("test", "rules", rules.parent / "power.test.yaml")


def test_both_forms_carry_the_same_rules(render, rules: Path):
    as_object = one(render("monitoring.rules=PrometheusRule"), "PrometheusRule")["spec"]

    assert as_object == yaml.safe_load(rules.read_text())
