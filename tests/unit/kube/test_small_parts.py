"""Waiting, limiting, naming, telling errors apart, and comparing what is said."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.kube.apply import normal_form
from tokenfactory.kube.backoff import Backoff
from tokenfactory.kube.errors import (
    ApiError,
    ConflictError,
    GoneError,
    NotFoundError,
    UnauthorizedError,
    error_of,
)
from tokenfactory.kube.objects import Lease, Node, Pod, PodStatus
from tokenfactory.kube.ratelimit import RateLimiter
from tokenfactory.kube.resources import body_of, collection_path, object_path

# --- backoff


@given(draws=st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_a_wait_is_never_zero_and_never_above_the_longest(draws):
    waiting = iter(draws)
    backoff = Backoff(0.5, 8.0, draw=lambda: next(waiting))
    waits = [backoff.next() for _ in draws]
    for n, seconds in enumerate(waits):
        assert 0.05 * min(8.0, 0.5 * 2**n) <= seconds <= min(8.0, 0.5 * 2**n)


def test_success_starts_over():
    backoff = Backoff(0.5, 8.0, draw=lambda: 1.0)
    assert [backoff.next() for _ in range(6)] == [0.5, 1, 2, 4, 8, 8]
    backoff.reset()
    assert backoff.next() == 0.5


# --- rate limit


@given(
    gaps=st.lists(st.floats(0, 0.5), min_size=1, max_size=60),
    per_second=st.floats(1, 100),
    burst=st.integers(1, 20),
)
def test_never_more_than_the_burst_and_the_rate(gaps, per_second, burst):
    now = 0.0
    limiter = RateLimiter(per_second, burst, clock=lambda: now)
    starts = []
    for gap in gaps:
        now += gap
        starts.append(now + limiter.reserve())
    assert starts == sorted(starts), "places are given in the order of asking"
    for n, first in enumerate(starts):
        for m in range(n + burst, len(starts)):
            assert m - n + 1 <= burst + (starts[m] - first) * per_second + 1e-6


def test_within_the_burst_nobody_waits():
    limiter = RateLimiter(1, 3, clock=lambda: 0.0)
    assert [limiter.reserve() for _ in range(5)] == [0, 0, 0, 1, 2]


@pytest.mark.parametrize(("per_second", "burst"), [(0, 1), (-1, 1), (1, 0)])
def test_a_limit_that_lets_nothing_pass_is_refused(per_second, burst):
    with pytest.raises(ValueError, match="per_second > 0 and burst >= 1"):
        RateLimiter(per_second, burst)


# --- paths


PATHS = {
    "all pods": (lambda: collection_path(Pod), "/api/v1/pods"),
    "pods of a namespace": (lambda: collection_path(Pod, "chat"), "/api/v1/namespaces/chat/pods"),
    "a node": (lambda: object_path(Node, ("", "n1")), "/api/v1/nodes/n1"),
    "a lease": (
        lambda: object_path(Lease, ("ns", "l")),
        "/apis/coordination.k8s.io/v1/namespaces/ns/leases/l",
    ),
    "a sheet's status": (
        lambda: object_path(CapSheet, ("", "hall-a"), "status"),
        "/apis/tokenfactory.dev/v1alpha1/capsheets/hall-a/status",
    ),
}


@pytest.mark.parametrize(("path", "want"), PATHS.values(), ids=PATHS.keys())
def test_paths(path, want):
    assert path() == want


def test_a_forgotten_or_needless_namespace_is_told():
    with pytest.raises(ValueError, match="say which"):
        object_path(Pod, ("", "p"))
    with pytest.raises(ValueError, match="leave out the namespace"):
        collection_path(Node, "default")


def test_a_body_says_kind_and_version_although_types_leave_out_defaults():
    body = body_of(CapSheet, ("", "hall-a"), {"spec": {}}, {"uid": "u"})
    assert body == {
        "apiVersion": "tokenfactory.dev/v1alpha1",
        "kind": "CapSheet",
        "metadata": {"name": "hall-a", "uid": "u"},
        "spec": {},
    }


# --- errors


@pytest.mark.parametrize(
    ("code", "kind"),
    [(401, UnauthorizedError), (404, NotFoundError), (409, ConflictError), (410, GoneError), (500, ApiError)],
)
def test_errors_are_told_apart(code, kind):
    body = msgspec.json.encode({"kind": "Status", "code": code, "reason": "R", "message": "because"})
    error = error_of("GET /x", code, body)
    assert type(error) is kind
    assert str(error) == f"GET /x: {code} R: because"


def test_a_body_that_is_no_status_is_quoted():
    assert "<html>bad gateway" in str(error_of("GET /x", 502, b"<html>bad gateway"))


WAITS = {
    "the header": (b"{}", "7", 7.0),
    "the status": (b'{"details":{"retryAfterSeconds":3}}', None, 3.0),
    "the header counts more": (b'{"details":{"retryAfterSeconds":3}}', "7", 7.0),
    "a date is not understood": (b"{}", "Wed, 21 Oct 2026 07:28:00 GMT", None),
    "neither": (b"{}", None, None),
}


@pytest.mark.parametrize(("body", "header", "want"), WAITS.values(), ids=WAITS.keys())
def test_retry_after(body, header, want):
    assert error_of("GET /x", 429, body, header).retry_after_seconds == want


# --- comparing


def test_order_of_keys_empty_fields_and_types_say_nothing():
    plain = {"podIP": "10.0.0.1", "phase": "Running", "conditions": [], "message": None}
    assert normal_form(PodStatus(phase="Running", pod_ip="10.0.0.1")) == normal_form(plain)


@pytest.mark.parametrize("other", [{"a": 1}, {"a": 0, "b": 0}, {"a": False}, {"a": ""}, {}])
def test_zero_false_and_empty_text_do_say_something(other):
    assert normal_form({"a": 0}) != normal_form(other)


# --- what is read of nodes and pods


def test_an_image_that_lost_its_names_makes_no_node_unreadable():
    said = (
        b'{"status": {"images": [{"names": null, "sizeBytes": 1}, {"names": ["nim:1"]}, {"sizeBytes": 2}]}}'
    )
    node = msgspec.json.decode(said, type=Node)
    assert [image.names for image in node.status.images] == [("nim:1",)]


def test_what_thousands_have_alike_is_held_once():
    image = b'{"status": {"images": [{"names": ["nim@sha256:ab", "nim:1"]}]}}'
    one, other = (msgspec.json.decode(image, type=Node) for _ in range(2))
    assert one.status.images[0] is other.status.images[0]
    spec = b'{"spec": {"tolerations": [{"key": "a", "operator": "Exists"}], "volumes": [{"emptyDir": {}}, {"persistentVolumeClaim": {"claimName": "c"}}]}}'
    first, second = (msgspec.json.decode(spec, type=Pod) for _ in range(2))
    assert first.spec.tolerations is second.spec.tolerations
    assert [each.persistent_volume_claim.claim_name for each in first.spec.volumes] == ["c"]
