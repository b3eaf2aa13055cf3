from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.chart.helm import Helm, objects_of

from tokenfactory.twin.toolchain import ensure_helm


@pytest.fixture(scope="session")
def helm() -> Helm:
    return Helm(ensure_helm())


@pytest.fixture
def render(helm: Helm) -> Callable[..., list[dict[str, Any]]]:
    """The chart's objects with these values: `render("agent.enabled=false")`."""
    return lambda *values: objects_of(helm.template(*values))


ROOT = Path(__file__).parents[2]
