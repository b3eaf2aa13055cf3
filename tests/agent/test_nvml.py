"""The agent's NVML interface over real pynvml and the simulated library: every call that can fail, fails here."""

from __future__ import annotations

from tokenfactory.agent.nvml import Limits


async def test_a_limit_is_set_and_read_back(make_node, open_driver):
    node = make_node("H100", 2)
    driver = await open_driver(node)
    first, _ = await driver.inventory()
    answer = await driver.set_limit(first.uuid, 450_000)
    assert answer == Limits(200_000, 700_000, 700_000, 450_000, 450_000)
    assert node.gpus[0].enforced_watts == 450
    assert node.gpus[1].enforced_watts == 700
