"""`EfficiencyMet`: what counts, and the nearest fix."""

import re
from dataclasses import replace

import pytest

from tokenfactory.planning.efficiency.verdict import Counter, Energy, Situation, delta, judge_efficiency

HOUR = Energy(seconds=3_600, generated_tokens=3_000_000, serving_millijoules=1_000_000_000)
WELL = Situation(
    concurrency=120,
    best_concurrency=128,
    replicas=4,
    min_replicas=2,
    best_tokens_per_joule=5.0,
    cap_milliwatts=400_000,
    knee_milliwatts=400_000,
)


def test_every_joule_counts_as_far_as_the_scope_goes() -> None:
    energy = Energy(60, 1_000, 400_000, 100_000, 250_000, 250_000)
    assert energy.tokens_per_joule("GPU") == pytest.approx(2.0)
    assert energy.tokens_per_joule("Node") == pytest.approx(1_000 / 750)
    assert energy.tokens_per_joule("Facility") == pytest.approx(1.0)


def test_met_and_missed_at_the_mark() -> None:
    assert judge_efficiency(3.0, "GPU", HOUR, WELL).status == "True"
    missed = judge_efficiency(3.01, "GPU", HOUR, WELL)
    assert missed.status == "False"
    assert missed.message.startswith("3.00 tokens/J of 3.01 (GPU): ")


def test_recovery_can_miss_the_target() -> None:
    assert judge_efficiency(3.0, "GPU", replace(HOUR, recovery_millijoules=1), WELL).status == "False"
    assert judge_efficiency(3.0, "GPU", replace(HOUR, recovery_millijoules=1), WELL).status == "False"


FIXES = {
    "Recovering": (replace(HOUR, recovery_millijoules=300_000_000), WELL),
    "TargetBeyondProfile": (HOUR, replace(WELL, best_tokens_per_joule=3.5)),
    "NoTraffic": (replace(HOUR, generated_tokens=0), WELL),
    "LowConcurrency": (HOUR, replace(WELL, concurrency=20)),
    "LatencyBound": (HOUR, replace(WELL, concurrency=20, held_by_latency=True)),
    "TooManyAtMinimum": (HOUR, replace(WELL, concurrency=20, replicas=2)),
    "TooLittleTraffic": (HOUR, replace(WELL, concurrency=20, replicas=1, min_replicas=1)),
    "WorseProduct": (
        HOUR,
        replace(
            WELL,
            tokens_by_product={"A100": 50.0, "H100": 50.0},
            tokens_per_joule_by_product={"A100": 1.0, "H100": 3.0},
        ),
    ),
    "CapsAboveKnee": (HOUR, replace(WELL, cap_milliwatts=700_000)),
    "OverheadDraw": (replace(HOUR, overhead_millijoules=2_000_000_000), WELL),
    "BelowTarget": (HOUR, WELL),
}


@pytest.mark.parametrize("reason", FIXES)
def test_the_nearest_fix(reason: str) -> None:
    energy, situation = FIXES[reason]
    verdict = judge_efficiency(4.0, "Node", energy, situation)
    assert (verdict.status, verdict.reason) == ("False", reason)


def test_the_fix_names_its_figures() -> None:
    verdict = judge_efficiency(4.0, "Node", *FIXES["TargetBeyondProfile"])
    assert "ask for at most 3.50" in verdict.message
    verdict = judge_efficiency(4.0, "Node", *FIXES["WorseProduct"])
    assert "50% of its tokens are made on A100 at 1.00 tokens/J: H100 makes 3.00" in verdict.message


@pytest.mark.parametrize("best", [3.4962, 0.23789, 0.004567, 1_234.5])
def test_who_asks_for_what_was_named_is_not_told_that_it_is_too_much(best: float) -> None:
    situation = replace(WELL, best_tokens_per_joule=best)
    refused = judge_efficiency(2 * best, "GPU", replace(HOUR, generated_tokens=1), situation)
    assert refused.reason == "TargetBeyondProfile"
    named = re.search(r"at most ([0-9.]+),", refused.message)
    assert named is not None
    assert 0.99 * best < float(named[1]) <= best
    asked = judge_efficiency(float(named[1]), "GPU", replace(HOUR, generated_tokens=1), situation)
    assert asked.reason != "TargetBeyondProfile"


def test_too_short_a_window_says_nothing() -> None:
    assert judge_efficiency(3.0, "GPU", replace(HOUR, seconds=10), WELL).status == "Unknown"
    assert judge_efficiency(3.0, "GPU", replace(HOUR, serving_millijoules=0), WELL).status == "Unknown"
    assert judge_efficiency(None, "GPU", HOUR, WELL).reason == "NoTarget"


def test_counters_that_begin_anew_lose_tokens_and_joules_alike() -> None:
    before = Counter("a", 1_000, 5_000)
    assert delta(before, Counter("a", 1_500, 5_600)) == (500, 600)
    assert delta(before, Counter("b", 30, 70)) == (30, 70)
    assert delta(before, Counter("a", 2_000, 70)) == (2_000, 70)
    assert delta(None, Counter("a", 1_500, 5_600)) == (0, 0)
