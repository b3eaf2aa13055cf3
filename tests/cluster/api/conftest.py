from collections.abc import Iterator

import pytest
from tests.cluster.api.manifests import GOOD, Asking

from tokenfactory.twin.cluster import Cluster


@pytest.fixture(scope="module")
def asking(cluster: Cluster, crds: None, namespace: str) -> Asking:
    return Asking(cluster, namespace)


@pytest.fixture(scope="module")
def stored(asking: Asking) -> Iterator[dict[str, dict]]:
    """Every good object, really created: what updates are tried on."""
    objects = {name: asking.create(body) for name, body in GOOD.items()}
    yield objects
    for body in objects.values():
        asking.delete(body)
