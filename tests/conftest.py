"""What tests of every kind may ask for.

`cluster` is one real control plane for the whole run; what a module does there stays in its `namespace`,
or is cluster-scoped under names of its own. A test that stops components, fills the audit log or needs
other options takes `own_cluster`.
"""

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests import sharing

from tokenfactory.twin import toolchain, workshop
from tokenfactory.twin.cluster import Cluster, ClusterOptions

_numbers = itertools.count(1)
_CLUSTERS = {"cluster", "own_cluster", "start_cluster", "real_node"}


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> sharing.Pieces:
    return sharing.Pieces(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
    dot = report.when == "call" and report.passed and not hasattr(report, "wasxfail")
    return ("passed", "", "") if dot and sharing.says_pieces(config) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # alone, tests run in the order in which one reads them
        sharing.longest_first(items)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build the control plane before the first test, where no test's time limit counts and it is seen."""
    if session.config.option.collectonly:
        return
    if any(_CLUSTERS & set(getattr(item, "fixturenames", ())) for item in session.items):
        capture = session.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
            try:
                toolchain.ensure_control_plane()
            except workshop.ToolError as error:
                pytest.exit(
                    f"no control plane for the cluster tests: {error}", returncode=pytest.ExitCode.USAGE_ERROR
                )


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The control plane that all modules share: cluster-admin, RBAC on, no node."""
    with Cluster.up(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(scope="session")
def crds(cluster: Cluster) -> None:
    """Our kinds in the shared cluster, served and ready."""
    cluster.kubectl("apply", "--server-side", "-f", str(Path(__file__).parent.parent / "crds"))
    cluster.kubectl(
        "wait", "--for=condition=Established", "crd", "-l", "app.kubernetes.io/part-of=tokenfactory"
    )


@pytest.fixture(scope="module")
def namespace(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of this module's own in the shared cluster."""
    stem = re.sub(r"[^a-z0-9]+", "-", Path(request.node.path).stem.lower()).strip("-")
    name = f"{stem[:50]}-{next(_numbers)}"
    cluster.kubectl("create", "namespace", name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def start_cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Starts clusters of this test's own: `start_cluster(scheduler=False)`; all end with the test."""
    started: list[Cluster] = []

    def start(**options: object) -> Cluster:
        folder = tmp_path / f"cluster-{len(started)}"
        started.append(Cluster.up(folder, ClusterOptions(**options)))
        return started[-1]

    yield start
    for running in started:
        running.down()


@pytest.fixture
def own_cluster(start_cluster: Callable[..., Cluster]) -> Cluster:
    """A cluster that this test may break."""
    return start_cluster()
