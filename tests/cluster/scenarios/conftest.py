"""One site for all scenarios of a module: control plane, operator, four GPU nodes in two racks of one hall."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.cluster.scenarios.scene import Scene, plans

from tokenfactory.twin.cluster import Cluster
from tokenfactory.twin.site import Site


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    folder: Path = tmp_path_factory.mktemp("site")
    with Cluster.up(folder / "cluster") as cluster:
        async with Site(cluster, folder, plans(), cold_seconds=0.5) as running:
            yield running


@pytest_asyncio.fixture(loop_scope="module")
async def scene(site: Site) -> AsyncIterator[Scene]:
    """The site at rest, with its usual limits and no factory; the budget held when it is handed back."""
    scene = Scene(site)
    await scene.begin()
    yield scene
    await scene.end()
