"""The smaller scenes to their end, and every deliberate bug's trace."""

from __future__ import annotations

import pytest
from tests.fault.bugs import BUGS
from tests.fault.explore import explore
from tests.fault.model import WHERE
from tests.fault.parts import Kit
from tests.fault.scenes import SCENES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("scene", "states"), [("network", 10_000), ("nodes", 20_000)])
def test_a_scene_is_explored_to_its_end_and_keeps_the_limit(scene: str, states: int) -> None:
    result = explore(SCENES[scene], Kit(), faults=SCENES[scene].most_faults)
    assert result.complete
    assert result.violation == ""
    assert result.states > states


@pytest.mark.parametrize("scene", SCENES)
def test_without_faults_every_order_of_events_keeps_the_limit(scene: str) -> None:
    result = explore(SCENES[scene], Kit(), faults=0)
    assert result.complete
    assert result.violation == ""
    assert result.states > 10


@pytest.mark.parametrize("bug", WHERE)
def test_a_deliberate_bug_is_found_with_its_shortest_trace(bug: str) -> None:
    scene, faults = WHERE[bug]
    result = explore(SCENES[scene], BUGS[bug], faults=faults)
    assert result.violation
    assert 2 <= len(result.trace) <= 23
