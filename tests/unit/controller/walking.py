"""How long walks are searched: the same ones in every run of the suite, and others in a search of its own."""

import os

from hypothesis import HealthCheck, Phase, settings

SEARCHED = "WALKS"
"""Environment: so many walks, drawn anew each time."""


def walks(usual: int) -> settings:
    """Decorates a property of walks. None is made smaller once it failed: each costs seconds."""
    return settings(
        max_examples=int(os.environ.get(SEARCHED, usual)),
        deadline=None,
        phases=(Phase.explicit, Phase.reuse, Phase.generate),
        derandomize=SEARCHED not in os.environ,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
    )
