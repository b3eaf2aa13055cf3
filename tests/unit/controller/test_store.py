"""What people wrote, in whatever order Kopf and our own lists bring it."""

import pytest

from tokenfactory.api.meta import ObjectMeta
from tokenfactory.api.power_domain import PowerDomain, PowerDomainSpec
from tokenfactory.controller.store import Store


def domain(name: str = "hall", version: int = 1, uid: str = "u1", limit: str = "1MW") -> PowerDomain:
    meta = ObjectMeta(name=name, uid=uid, resource_version=str(version))
    return PowerDomain(metadata=meta, spec=PowerDomainSpec(limit=limit))


@pytest.fixture
def store() -> Store[PowerDomain]:
    store = Store(PowerDomain)
    store.replace_all([domain(version=5)], version=10)
    return store


def held(store: Store[PowerDomain]) -> dict[str, str]:
    return {name: obj.spec.limit for (_, name), obj in store.snapshot().items()}


def test_it_is_complete_only_after_a_whole_list():
    store = Store(PowerDomain)
    store.put(domain())
    assert not store.complete
    store.replace_all([], version=3)
    assert store.complete


def test_an_older_event_changes_nothing(store: Store[PowerDomain]):
    store.put(domain(version=4, limit="9MW"))
    assert held(store) == {"hall": "1MW"}


def test_what_a_later_list_lacks_is_gone_but_not_what_came_after_it(store: Store[PowerDomain]):
    store.put(domain("attic", version=20, uid="u2"))
    store.replace_all([], version=15)
    assert held(store) == {"attic": "1MW"}


def test_a_late_event_does_not_bring_a_deleted_object_back(store: Store[PowerDomain]):
    store.delete(("", "hall"), "u1", version=12)
    store.put(domain(version=11))
    assert held(store) == {}


def test_the_deletion_of_a_namesake_leaves_the_new_one(store: Store[PowerDomain]):
    store.put(domain(version=30, uid="u2", limit="2MW"))
    store.delete(("", "hall"), "u1", version=29)
    assert held(store) == {"hall": "2MW"}


def test_an_object_that_does_not_fit_keeps_its_last_good_state_and_is_named(store: Store[PowerDomain]):
    store.broken(("", "hall"), "limit: expected text")
    store.replace_all(
        [], version=40, undecodable={("", "hall"): "limit: expected text"}, uids={("", "hall"): "u1"}
    )
    assert held(store) == {"hall": "1MW"}
    assert store.uids == {("", "hall"): "u1"}
    assert store.undecodable == {("", "hall"): "limit: expected text"}
    store.put(domain(version=41, limit="3MW"))
    assert held(store) == {"hall": "3MW"}
    assert store.undecodable == {}


def test_an_object_that_does_not_fit_and_was_deleted_unseen_is_gone_with_the_next_list(
    store: Store[PowerDomain],
):
    store.broken(("", "hall"), "limit: expected text")
    store.broken(("", "attic"), "limit: expected text")
    store.replace_all([], version=40)
    assert held(store) == {}
    assert store.undecodable == {}


def test_listeners_hear_of_changes_only(store: Store[PowerDomain]):
    heard: list[int] = []
    store.on_change(lambda: heard.append(1))
    store.put(domain(version=5))
    assert heard == []
    store.put(domain(version=6))
    assert heard == [1]


def test_a_snapshot_never_changes(store: Store[PowerDomain]):
    before = store.snapshot()
    store.delete(("", "hall"), "u1", version=12)
    assert len(before) == 1
