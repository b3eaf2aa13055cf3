"""The report on a real GPU, run as a process over the simulated library."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tokenfactory.twin.nvml import function_numbers


def run(node, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "tokenfactory.agent.gpucheck", *arguments],
        env={**os.environ, **node.environment}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("product", ["H200", "GB200"])
def test_it_reads_everything_and_sets_nothing(make_node, product):
    node = make_node(product, 2)
    done = run(node, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["agent"]["gpus"]) == len(report["calls"]) == 2
    answers = {call["call"]: call for call in report["calls"][0]["calls"]}
    assert answers["nvmlDeviceGetName"]["answer"] == f"NVIDIA {product}"
    assert ("answer" in answers["nvmlDeviceGetPlatformInfo"]) == (product == "GB200")
    assert report["calls"][0]["fields"]["supported"]["230"] == 0
    setters = [
        f
        for f in function_numbers(node.library)
        if "Set" in f.removeprefix("nvmlEventSet") or "Update" in f or "Reset" in f
    ]
    assert len(setters) >= 5
    assert {f: node.calls(f) for f in setters} == dict.fromkeys(setters, 0)


def test_a_call_that_fails_is_one_line_not_the_end(make_node):
    node = make_node("H100", 1)
    node.fail("nvmlDeviceGetPowerUsage", error=999)
    done = run(node)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "nvmlDeviceGetPowerUsage" in line]
    assert any(line.strip().startswith("NO") for line in lines)
    assert "yes" in next(
        line for line in done.stdout.splitlines() if "nvmlDeviceGetEnforcedPowerLimit:" in line
    )


def test_without_a_driver_it_says_so(make_node):
    node = make_node("H100", 1)
    node.unload_driver()
    done = run(node)
    assert done.returncode == 1
    assert "nvmlInit: driver gone" in done.stdout
