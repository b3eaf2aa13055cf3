"""XIDs, health and the lemon score."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenfactory.agent import xid
from tokenfactory.agent.health import (
    LEMON_HALF_LIFE_SECONDS,
    MOST_INCIDENTS,
    RECOVERIES,
    History,
    assess,
    lemon_score,
)
from tokenfactory.agent.nvml import (
    Fabric,
    Failure,
    FailureKind,
    Identity,
    Reading,
    Reason,
    Recovery,
    Wear,
    Xid,
)
from tokenfactory.agent.xid import Action

BOOT = Identity("boot-1", 1)
WELL = Wear(recovery=Recovery.NONE, nvlinks=18, nvlinks_up=18, remap_failed=False, remap_pending=False)
CALM = Reading(0.0, reasons=Reason(0))


def verdict(*codes, wear=WELL, reading=CALM, identity=BOOT, links=18):
    history = History()
    for place, code in enumerate(codes):
        history = history.after(Xid("GPU-a", code), place * 1000.0, BOOT)
    return assess(history, identity, wear, reading, links_expected=links)


@pytest.mark.parametrize(
    ("codes", "action", "fatal"),
    [
        ((13, 31, 94), Action.RESTART_APP, False),
        ((43, 63), Action.NONE, False),
        ((46, 62, 64, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158), Action.RESET_GPU, True),
        ((79, 160), Action.REBOOT_NODE, True),
        ((48, 74, 144, 145, 146, 147, 148, 149, 150), Action.INVESTIGATE, True),
        ((45,), Action.INVESTIGATE, False),
        ((154,), Action.ASK_DRIVER, False),
        ((9999,), Action.INVESTIGATE, False),
    ],
)
def test_the_table_says_what_each_xid_asks_for(codes, action, fatal):
    for code in codes:
        told = verdict(code)
        assert (told.action, told.healthy) == (action, not fatal), code
        assert any(f"XID {code}" in fault for fault in told.faults) == fatal


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[xid.1]\nmeaning = "x"\naction = "pray"\nweight = 0.1', "Invalid enum value 'pray'"),
        ('[xid.1]\nmeaning = "x"\naction = "none"\nweight = 7.0', "write a number from 0 to 1"),
        ('[xid.1]\nmeaning = "x"\naction = "none"\nweight = 0.1\nfatale = true', "unknown field `fatale`"),
    ],
)
def test_a_wrong_entry_in_the_table_is_refused(text, complaint):
    with pytest.raises(msgspec.ValidationError, match=complaint):
        xid.parse(text)


def test_the_strongest_action_wins():
    assert verdict(13, 46, 79).action is Action.REBOOT_NODE
    assert verdict(79, 46, 13).action is Action.REBOOT_NODE
    assert verdict(13, wear=replace(WELL, recovery=Recovery.GPU_RESET)).action is Action.RESET_GPU


def test_a_new_life_of_the_driver_wipes_the_slate():
    assert not verdict(79).healthy
    for identity in (Identity("boot-2", 1), Identity("boot-1", 2)):
        assert verdict(79, identity=identity).healthy


@pytest.mark.parametrize("recovery", [recovery for recovery in Recovery if recovery is not Recovery.NONE])
def test_whatever_recovery_the_driver_asks_for_stops_new_work(recovery):
    told = verdict(wear=replace(WELL, recovery=recovery))
    assert not told.healthy
    assert told.action is RECOVERIES[recovery]
    assert recovery.name in told.faults[0]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"remap_failed": True}, "could not be remapped"),
        ({"nvlinks_up": 15}, "3 of 18 NVLinks are down"),
        ({"fabric": Fabric("c", 1, "InProgress", healthy=False)}, "fabric is not healthy"),
    ],
)
def test_wear_that_stops_new_work(changes, fault):
    told = verdict(wear=replace(WELL, **changes))
    assert not told.healthy
    assert fault in told.faults[0]


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"remap_pending": True}, "wait for a reset"),
        ({"ecc_volatile_uncorrected": 2}, "2 uncorrected"),
        ({"persistence": False}, "persistence mode is off"),
    ],
)
def test_wear_that_is_only_told(changes, note):
    told = verdict(wear=replace(WELL, **changes))
    assert told.healthy
    assert note in told.notes[0]


def test_a_board_without_nvlinks_in_use_is_not_missing_any():
    assert verdict(wear=replace(WELL, nvlinks_up=0), links=0).healthy


@pytest.mark.parametrize(
    ("reasons", "facility", "note"),
    [
        (Reason.SW_POWER_CAP, False, None),
        (Reason.SW_POWER_CAP | Reason.IDLE | Reason.APPLICATION_CLOCKS, False, None),
        (Reason.HW_POWER_BRAKE | Reason.HW_SLOWDOWN, True, "power brake"),
        (Reason.HW_THERMAL | Reason.HW_SLOWDOWN, False, "thermal slowdown at 90"),
        (Reason.SW_THERMAL, False, "because of its temperature"),
    ],
)
def test_reasons_for_low_clocks_are_never_the_gpus_fault(reasons, facility, note):
    told = verdict(reading=Reading(0.0, celsius=90, reasons=reasons))
    assert told.healthy
    assert told.action is Action.NONE
    assert told.facility == facility
    assert [bool(note and note in text) for text in told.notes] == ([True] if note else [])


@pytest.mark.parametrize(
    ("kind", "healthy", "action"),
    [
        (FailureKind.LOST, False, Action.REBOOT_NODE),
        (FailureKind.TIMEOUT, False, Action.INVESTIGATE),
        (FailureKind.DRIVER_GONE, False, Action.NONE),
        (FailureKind.UNKNOWN, True, Action.NONE),
        (FailureKind.NOT_SUPPORTED, True, Action.NONE),
    ],
)
def test_no_answer_is_an_answer(kind, healthy, action):
    failure = Failure(kind, "nvmlDeviceGetTotalEccErrors", "GPU-a")
    told = verdict(wear=failure, reading=failure)
    assert (told.healthy, told.action) == (healthy, action)


def test_a_storm_of_one_xid_is_one_incident():
    history = History()
    for second in range(200):
        history = history.after(Xid("GPU-a", 95), float(second), BOOT)
    assert len(history.incidents) == 1
    assert len(history.after(Xid("GPU-a", 95), 1000.0, BOOT).incidents) == 2


def test_a_gpu_that_never_stops_failing_cannot_fill_the_agent():
    history = History()
    for hour in range(1000):
        history = history.after(Xid("GPU-a", 95), hour * 3600.0, BOOT)
    assert len(history.incidents) == MOST_INCIDENTS
    assert history.incidents[-1].at_seconds == 999 * 3600.0, "the latest are kept"


@given(st.lists(st.tuples(st.integers(0, 200), st.floats(0, 1e7)), max_size=200))
def test_the_score_only_fades(events):
    history = History()
    for code, at in events:
        history = history.after(Xid("GPU-a", code), at, BOOT)
    now = lemon_score([history], 1e7)
    later = lemon_score([history], 1e7 + LEMON_HALF_LIFE_SECONDS)
    assert later == pytest.approx(now / 2)
    assert lemon_score([history, history], 1e7) == pytest.approx(2 * now)


def test_app_errors_do_not_make_a_lemon_and_bad_memory_does():
    apps, memory = History(), History()
    for place in range(5):
        apps = apps.after(Xid("GPU-a", 13), place * 1000.0, BOOT)
        memory = memory.after(Xid("GPU-a", 95), place * 1000.0, BOOT)
    assert lemon_score([apps], 5000) < 0.6
    assert lemon_score([memory], 5000) > 4.9
