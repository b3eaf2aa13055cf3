"""A lost replica's incident: recorded before anything is done, then seen through to tokens flowing."""

import msgspec
import pytest

from tokenfactory.api.token_factory import Recovery
from tokenfactory.planning.recovery.incidents import LostReplica, ReplicaFacts, Situation, step

POLICY = Recovery(max_concurrent=2)


def lost(pod="chat-a", node="n1"):
    return LostReplica(
        pod=pod, pod_uid=f"uid-{pod}", model="llama", node=node, cause="its agent is silent for 20s"
    )


def situation(*replicas, lost_replicas=(), fleet=8, lost_nodes=1, now="t1", enough=()):
    return Situation(
        now=now,
        lost=lost_replicas,
        replicas={replica.pod: replica for replica in replicas},
        fleet_nodes=fleet,
        lost_nodes=lost_nodes,
        enough=frozenset(enough),
    )


def facts(pod="chat-a", **known):
    return ReplicaFacts(pod=pod, model="llama", **known)


def test_nothing_is_deleted_before_the_incident_is_recorded():
    first = step((), situation(facts(), lost_replicas=[lost()]), POLICY)
    assert [incident.phase for incident in first.incidents] == ["Detected"]
    assert first.delete == ()
    second = step(first.incidents, situation(facts(), lost_replicas=[lost()]), POLICY)
    assert second.delete == ("chat-a",)


def test_what_was_leaving_anyway_is_no_loss():
    assert step((), situation(facts(terminating=True), lost_replicas=[lost()]), POLICY).incidents == ()


def test_it_is_seen_through_to_tokens_flowing():
    incidents = step((), situation(facts(), lost_replicas=[lost()]), POLICY).incidents
    story = [
        (situation(facts(terminating=True), lost_replicas=[lost()]), "Routed"),
        (situation(facts(terminating=True), facts("chat-b")), "Routed"),
        (situation(facts(terminating=True), facts("chat-b", charged=True)), "Charged"),
        (situation(facts("chat-b", charged=True, opened=True)), "Restoring"),
        (
            situation(facts("chat-b", charged=True, opened=True, ready=True, restored_from="sha256:1")),
            "Verified",
        ),
        (situation(facts("chat-b", charged=True, opened=True, ready=True, tokens_flow=True)), "Closed"),
    ]
    for seen, phase in story:
        incidents = step(incidents, seen, POLICY).incidents
        assert [incident.phase for incident in incidents] == [phase]
    assert incidents[0].replacement == "chat-b"
    assert incidents[0].restored_from == "sha256:1"


def test_a_node_that_comes_back_before_anything_was_done_closes_it():
    incidents = step((), situation(facts(), lost_replicas=[lost()]), POLICY).incidents
    verdict = step(incidents, situation(facts(ready=True), lost_nodes=0), POLICY)
    assert verdict.incidents[0].phase == "Closed"
    assert "came back by itself" in verdict.incidents[0].cause
    assert verdict.delete == ()


def test_an_incident_that_nothing_will_replace_is_closed_and_says_so():
    """The model was taken out, or fewer are wanted than when it was lost."""
    incidents = step((), situation(facts(), lost_replicas=[lost()]), POLICY).incidents
    incidents = step(incidents, situation(lost_replicas=[lost()]), POLICY).incidents
    incidents = step(incidents, situation(), POLICY).incidents
    assert incidents[0].phase == "Routed"
    closed = step(incidents, situation(enough=["llama"]), POLICY).incidents[0]
    assert closed.phase == "Closed"
    assert "as many serve as are wanted" in closed.cause


def test_a_replacement_on_its_way_is_followed_though_others_would_do():
    incidents = step((), situation(facts(), lost_replicas=[lost()]), POLICY).incidents
    incidents = step(incidents, situation(lost_replicas=[lost()]), POLICY).incidents
    coming = situation(facts("chat-b", charged=True), enough=["llama"])
    assert step(incidents, coming, POLICY).incidents[0].phase == "Charged"


def test_starts_are_staggered():
    gone = [lost(f"chat-{n}") for n in range(5)]
    replicas = [facts(f"chat-{n}") for n in range(5)]
    incidents = step((), situation(*replicas, lost_replicas=gone), POLICY).incidents
    assert len(step(incidents, situation(*replicas, lost_replicas=gone), POLICY).delete) == 2


def test_two_incidents_do_not_claim_one_replacement():
    gone = [lost("chat-a"), lost("chat-b", "n2")]
    incidents = step((), situation(facts("chat-a"), facts("chat-b"), lost_replicas=gone), POLICY).incidents
    dying = (facts("chat-a", terminating=True), facts("chat-b", terminating=True))
    incidents = step(incidents, situation(*dying, lost_replicas=gone), POLICY).incidents
    for _ in range(3):
        incidents = step(incidents, situation(*dying, facts("chat-c"), facts("chat-d")), POLICY).incidents
    assert sorted(incident.replacement for incident in incidents) == ["chat-c", "chat-d"]


@pytest.mark.parametrize(
    ("lost_nodes", "fleet", "storm"), [(1, 2, False), (2, 4, False), (3, 8, True), (3, 10, False)]
)
def test_a_storm_stops_everything(lost_nodes, fleet, storm):
    gone = [lost(f"chat-{n}", f"n{n}") for n in range(lost_nodes)]
    replicas = [facts(f"chat-{n}") for n in range(lost_nodes)]
    seen = situation(*replicas, lost_replicas=gone, lost_nodes=lost_nodes, fleet=fleet)
    recorded = step((), seen, POLICY).incidents
    verdict = step(recorded, seen, msgspec.structs.replace(POLICY, max_concurrent=10))
    assert bool(verdict.storm) is storm
    assert (verdict.delete == ()) is storm


def test_what_came_back_and_is_lost_again_is_an_incident_again():
    """An operator that has just begun has heard nobody's silence yet, and takes each for one that came back."""
    incidents = step((), situation(facts(), lost_replicas=[lost()]), POLICY).incidents
    incidents = step(incidents, situation(facts(ready=True), lost_nodes=0), POLICY).incidents
    assert [each.phase for each in incidents] == ["Closed"]
    again = step(incidents, situation(facts(), lost_replicas=[lost()], now="t9"), POLICY)
    assert [(each.phase, each.detected_at) for each in again.incidents] == [("Detected", "t9")]
    assert again.delete == (), "not before it is recorded"
    assert step(again.incidents, situation(facts(), lost_replicas=[lost()]), POLICY).delete == ("chat-a",)


def test_what_was_replaced_is_no_incident_again_while_its_old_pod_cannot_end():
    closed = step((), situation(facts(), lost_replicas=[lost()]), POLICY).incidents
    for seen in (
        situation(facts(terminating=True), lost_replicas=[lost()]),
        situation(facts(terminating=True), lost_replicas=[lost()], enough=["llama"]),
        situation(facts(terminating=True), lost_replicas=[lost()], enough=["llama"]),
    ):
        closed = step(closed, seen, POLICY).incidents
    assert [each.phase for each in closed] == ["Closed"]
