"""The chart's alerts ask for nothing that no process tells: a metric that is renamed would silence one for ever."""

import re
from pathlib import Path

import yaml
from tests.unit.agent.hollow import Node
from tests.unit.agent.virtual import run

from tokenfactory.agent.metrics import render
from tokenfactory.controller.metrics import Metrics

RULES = Path(__file__).parents[3] / "charts" / "tokenfactory" / "files" / "rules"


def told() -> set[str]:
    found = {family.name for family in Metrics().registry.collect()}

    async def tell() -> None:
        node = Node(rest=900_000)
        await node.settle()
        found.update(re.findall(r"^# TYPE (\w+)", render(node.agent).decode(), flags=re.MULTILINE))
        await node.stop()

    run(tell())
    return found


def test_every_metric_that_a_rule_asks_for_is_told_by_the_operator_or_an_agent() -> None:
    groups = [group for file in RULES.iterdir() for group in yaml.safe_load(file.read_text())["groups"]]
    asked = {
        name
        for group in groups
        for rule in group["rules"]
        for name in re.findall(r"\btokenfactory_\w+", rule["expr"])
    }
    assert {"tokenfactory_domain_charge_watts", "tokenfactory_agent_node_power"} <= asked
    assert asked <= told()
