"""A bounded part of the exhaustive exploration. `make model` does it all."""

from __future__ import annotations

import pytest
from tests.fault.bugs import BUGS
from tests.fault.model import SCENES, WHERE, explore
from tests.fault.world import Kit

pytestmark = pytest.mark.slow


def test_without_faults_every_order_of_events_keeps_the_limit() -> None:
    result = explore(SCENES["network"], Kit(), faults=0)
    assert result.complete
    assert result.violation == ""
    assert result.states > 300


@pytest.mark.parametrize("scene", SCENES)
def test_the_first_states_with_one_fault_keep_the_limit(scene: str) -> None:
    result = explore(SCENES[scene], Kit(), faults=1, most_states=3_000)
    assert result.violation == ""
    assert result.states > 3_000


@pytest.mark.parametrize("bug", [bug for bug in WHERE if bug != "skip the claim"])
def test_each_deliberate_bug_is_found_with_its_shortest_trace(bug: str) -> None:
    """All but the one that takes minutes: that one is left to `make model`."""
    scene, faults = WHERE[bug]
    result = explore(SCENES[scene], BUGS[bug], faults=faults)
    assert result.violation
    assert 2 <= len(result.trace) <= 23
