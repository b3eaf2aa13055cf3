"""The tree as written, made sense of: limits now, paths, members, and problems told instead of raised."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenfactory.api.meta import LabelSelector, ObjectMeta, SelectorRequirement
from tokenfactory.api.power_domain import PowerDomain, PowerDomainSpec, TimetableEntry
from tokenfactory.planning.power import timetable, tree

NOON = datetime(2026, 1, 15, 12, 0, tzinfo=UTC)
KW = 10**6


def domain(name, limit="100kW", **spec):
    spec = {"reserve": "0%", **spec}
    return PowerDomain(metadata=ObjectMeta(name=name), spec=PowerDomainSpec(limit=limit, **spec))


def rack(name, parent, **labels):
    return domain(name, parent=parent, node_selector=LabelSelector(match_labels=labels))


BERLIN = "Europe/Berlin"


def peak(start, end, limit, zone="Europe/Dublin", **more):
    return TimetableEntry(name="peak", start=start, end=end, limit=limit, time_zone=zone, **more)


def reasons(found):
    return [(p.subject, p.reason) for p in found.problems]


class TestLimits:
    def test_what_is_left_is_limit_less_reserve_and_the_fixed_load_of_the_subtree(self):
        found = tree.build(
            [
                domain("hall", "1MW", reserve="3%", fixed_load="50kW"),
                domain("rack", "200kW", parent="hall", reserve="10%", fixed_load="5kW"),
            ],
            NOON,
        )
        assert found.problems == ()
        assert found.domains["hall"].usable_milliwatts == (1000 - 30 - 50 - 5) * KW
        assert found.domains["rack"].usable_milliwatts == (200 - 20 - 5) * KW
        assert found.domains["rack"].path == ("hall", "rack")

    def test_a_child_never_has_more_than_its_parent(self):
        found = tree.build(
            [domain("hall", "100kW", reserve="5%"), domain("rack", "1MW", parent="hall")], NOON
        )
        assert found.domains["rack"].limit_milliwatts == 100 * KW
        assert found.domains["rack"].usable_milliwatts == 95 * KW
        assert found.domains["rack"].bound_by == "parent hall"

    def test_a_reserve_is_of_the_own_limit_and_not_taken_off_a_lower_one_above(self):
        """Else a site that is cut to a third would take a tenth more from each hall below it."""
        domains = [domain("site", "300kW", reserve="3%"), domain("hall", "1MW", parent="site", reserve="3%")]
        found = tree.build(domains, NOON)
        assert found.domains["hall"].usable_milliwatts == found.domains["site"].usable_milliwatts == 291 * KW
        domains = [domain("site", "1MW"), domain("hall", "1MW", parent="site", reserve="3%")]
        assert tree.build(domains, NOON).domains["hall"].usable_milliwatts == 970 * KW

    def test_a_percentage_is_of_the_parents_limit(self):
        found = tree.build([domain("hall", "800kW"), domain("row", "12.5%", parent="hall")], NOON)
        assert found.domains["row"].limit_milliwatts == 100 * KW

    def test_a_reserve_is_rounded_up(self):
        found = tree.build([domain("hall", "0.001W", reserve="0.001%")], NOON)
        assert found.domains["hall"].usable_milliwatts == 0


class TestTimetable:
    @pytest.mark.parametrize(
        ("entry", "now", "open_now"),
        [
            (peak("17:00", "20:00", "75%"), datetime(2026, 1, 15, 17, 0, tzinfo=UTC), True),
            (peak("17:00", "20:00", "75%"), datetime(2026, 1, 15, 20, 0, tzinfo=UTC), False),
            # Irish summer time is UTC+1.
            (peak("17:00", "20:00", "75%"), datetime(2026, 7, 15, 16, 0, tzinfo=UTC), True),
            (peak("17:00", "20:00", "75%"), datetime(2026, 7, 15, 19, 30, tzinfo=UTC), False),
            # Over midnight, and the day is the one on which the window starts.
            (peak("22:00", "06:00", "75%"), datetime(2026, 1, 15, 3, 0, tzinfo=UTC), True),
            (peak("22:00", "06:00", "75%", days=("Wed",)), datetime(2026, 1, 15, 3, 0, tzinfo=UTC), True),
            (peak("22:00", "06:00", "75%", days=("Thu",)), datetime(2026, 1, 15, 3, 0, tzinfo=UTC), False),
            (peak("09:00", "09:00", "75%"), datetime(2026, 1, 15, 3, 0, tzinfo=UTC), True),
            # 25 October 2026: 01:00-02:00 happens twice; the window covers both.
            (peak("01:00", "02:00", "75%"), datetime(2026, 10, 25, 0, 0, tzinfo=UTC), True),
            (peak("01:00", "02:00", "75%"), datetime(2026, 10, 25, 1, 59, tzinfo=UTC), True),
            (peak("01:00", "02:00", "75%"), datetime(2026, 10, 25, 2, 0, tzinfo=UTC), False),
            # And it ends with the second 01:30 of that night.
            (peak("00:00", "01:30", "75%"), datetime(2026, 10, 25, 1, 15, tzinfo=UTC), True),
            (peak("00:00", "01:30", "75%"), datetime(2026, 10, 25, 1, 30, tzinfo=UTC), False),
            # 29 March 2026 in Berlin: 02:00-03:00 (from 01:00 UTC on) never shows on the clock; a window that begins or
            # ends there is longer by what it could also mean, and never lost.
            (peak("02:15", "02:45", "75%", zone=BERLIN), datetime(2026, 3, 29, 1, 0, tzinfo=UTC), True),
            (peak("02:00", "03:00", "75%", zone=BERLIN), datetime(2026, 3, 29, 0, 59, tzinfo=UTC), True),
            (peak("01:30", "02:30", "75%", zone=BERLIN), datetime(2026, 3, 29, 0, 45, tzinfo=UTC), True),
            (peak("02:30", "05:00", "75%", zone=BERLIN), datetime(2026, 3, 29, 1, 0, tzinfo=UTC), True),
            (peak("00:00", "02:59", "75%", zone=BERLIN), datetime(2026, 3, 29, 0, 59, tzinfo=UTC), True),
            (peak("02:30", "05:00", "75%", zone=BERLIN), datetime(2026, 3, 29, 3, 0, tzinfo=UTC), False),
            # A zone nobody knows: down is safe.
            (peak("01:00", "02:00", "75%", zone="Mars/Olympus"), NOON, True),
        ],
    )
    def test_windows(self, entry, now, open_now):
        found = tree.build([domain("hall", "100kW", timetable=(entry,))], now)
        assert found.domains["hall"].limit_milliwatts == (75 if open_now else 100) * KW
        if open_now:
            assert found.domains["hall"].bound_by == "timetable peak"

    @given(
        st.sampled_from(
            ["Europe/Berlin", "Europe/Dublin", "Africa/Cairo", "Australia/Lord_Howe", "America/St_Johns"]
        ),
        st.datetimes(datetime(2026, 1, 1), datetime(2027, 1, 1)),  # noqa: DTZ001
        st.times(),
        st.times(),
    )
    def test_a_window_is_open_whenever_the_clock_on_the_wall_says_so(self, zone, moment, start, end):
        moment = moment.replace(tzinfo=UTC)
        shown = moment.astimezone(ZoneInfo(zone)).time()
        start, end = start.replace(second=0, microsecond=0), end.replace(second=0, microsecond=0)
        within = start <= shown < end if start < end else (shown >= start or shown < end)
        entry = peak(f"{start:%H:%M}", f"{end:%H:%M}", "75%", zone=zone)
        if within:
            assert timetable.holds(entry, moment)

    @given(st.data())
    def test_no_instant_undercuts_the_tree_with_every_window_open(self, data):
        times = st.times().map(lambda each: f"{each:%H:%M}")
        limits = st.sampled_from(["0W", "10%", "50%", "90%", "70kW", "200kW"])
        windows = st.builds(peak, times, times, limits, st.sampled_from(["Europe/Berlin", "Asia/Tokyo"]))
        made = [
            domain(
                name,
                data.draw(st.sampled_from(["100kW", "60kW"] if parent is None else ["100kW", "30%", "80%"])),
                parent=parent,
                reserve=data.draw(st.sampled_from(["0%", "5%"])),
                fixed_load=data.draw(st.sampled_from(["0W", "20kW"])),
                timetable=tuple(data.draw(st.lists(windows, max_size=2))),
            )
            for name, parent in (("hall", None), ("row", "hall"), ("rack", "row"), ("cage", "hall"))
        ]
        lowest = tree.build(made, None).domains
        moment = data.draw(st.datetimes(datetime(2026, 1, 1), datetime(2027, 1, 1)))  # noqa: DTZ001
        for name, now in tree.build(made, moment.replace(tzinfo=UTC)).domains.items():
            assert lowest[name].usable_milliwatts <= now.usable_milliwatts

    def test_an_unknown_zone_is_a_problem(self):
        found = tree.build([domain("hall", timetable=(peak("01:00", "02:00", "5%", zone="Mars/X"),))], NOON)
        assert reasons(found) == [("hall", "UnknownTimeZone")]

    def test_the_next_change_is_told(self):
        hall = domain("hall", timetable=(peak("17:00", "20:00", "75%"),))
        assert tree.next_change([hall], NOON) == datetime(2026, 1, 15, 17, 0, tzinfo=UTC)
        assert tree.next_change([hall], datetime(2026, 1, 15, 18, 0, tzinfo=UTC)) == datetime(
            2026, 1, 15, 20, 0, tzinfo=UTC
        )
        assert tree.next_change([domain("x")], NOON) is None

    @given(st.datetimes(datetime(2026, 1, 1), datetime(2027, 1, 1)))  # noqa: DTZ001
    def test_a_limit_only_changes_when_it_was_foretold(self, moment):
        moment = moment.replace(tzinfo=UTC)
        hall = domain("hall", timetable=(peak("22:00", "06:00", "75%"), peak("05:00", "07:30", "50%")))
        change = tree.next_change([hall], moment)
        before = tree.build([hall], moment).domains["hall"].limit_milliwatts
        just_before = change - (change - moment) / 1000
        assert tree.build([hall], just_before).domains["hall"].limit_milliwatts == before


class TestProblems:
    def test_a_missing_parent_leaves_nothing_to_hand_out_below(self):
        found = tree.build([domain("row", parent="hall"), domain("rack", parent="row")], NOON)
        assert reasons(found) == [("row", "ParentMissing")]
        assert found.domains["row"].usable_milliwatts == 0
        assert found.domains["rack"].usable_milliwatts == 0

    def test_a_cycle_is_told_at_every_domain_on_it_and_touches_no_other_tree(self):
        found = tree.build(
            [domain("a", parent="b"), domain("b", parent="c"), domain("c", parent="a"), domain("ok")], NOON
        )
        assert reasons(found) == [("a", "Cycle"), ("b", "Cycle"), ("c", "Cycle")]
        assert [found.domains[n].usable_milliwatts for n in ("a", "b", "c", "ok")] == [0, 0, 0, 100 * KW]

    def test_a_domain_that_is_its_own_parent(self):
        assert reasons(tree.build([domain("a", parent="a")], NOON)) == [("a", "Cycle")]

    def test_a_percentage_without_a_parent(self):
        assert reasons(tree.build([domain("a", "50%")], NOON)) == [("a", "PercentWithoutParent")]

    def test_a_fixed_load_above_the_limit(self):
        found = tree.build([domain("a", "10kW", fixed_load="11kW")], NOON)
        assert reasons(found) == [("a", "FixedLoadDoesNotFit")]
        assert found.domains["a"].usable_milliwatts == 0

    @given(
        st.dictionaries(
            st.sampled_from("abcdefgh"), st.none() | st.sampled_from("abcdefghx"), min_size=1, max_size=8
        ),
        st.sampled_from(["100kW", "50%", "rubbish"]),
    )
    def test_whatever_is_written_every_domain_gets_a_path_and_nothing_raises(self, parents, limit):
        found = tree.build([domain(n, limit, parent=p) for n, p in parents.items()], NOON)
        assert set(found.domains) == set(parents)
        for name, each in found.domains.items():
            assert each.path[-1] == name
            assert len(set(each.path)) == len(each.path)
            for above in each.path[:-1]:
                assert each.usable_milliwatts <= found.domains[above].usable_milliwatts
        assert found.forest.count == len(parents)


class TestMembers:
    site = tree.build(
        [
            domain("site", node_selector=LabelSelector()),
            rack("hall-a", "site", hall="a"),
            rack("rack-1", "hall-a", rack="1"),
            rack("rack-2", "hall-a", rack="2"),
            rack("odd", "site", odd="yes"),
        ],
        NOON,
    )

    @pytest.mark.parametrize(
        ("labels", "expected"),
        [
            ({}, "site"),
            ({"hall": "a"}, "hall-a"),
            ({"hall": "a", "rack": "1"}, "rack-1"),
            ({"rack": "2"}, "rack-2"),
            ({"rack": "3"}, "site"),
        ],
    )
    def test_a_node_belongs_to_the_deepest_domain_that_selects_it(self, labels, expected):
        assert self.site.member("n", labels) == tree.Member(expected)

    def test_two_domains_that_do_not_feed_each_other_are_a_problem(self):
        member = self.site.member("n", {"rack": "1", "odd": "yes"})
        assert member.domain == "rack-1"
        assert member.problem is not None
        assert member.problem.reason == "NodeInTwoDomains"
        assert "odd" in member.problem.message

    def test_a_node_that_nobody_selects_belongs_nowhere(self):
        assert tree.build([domain("a")], NOON).member("n", {"x": "y"}) == tree.Member(None)

    @pytest.mark.parametrize(
        ("operator", "values", "labels", "selected"),
        [
            ("In", ("a", "b"), {"k": "b"}, True),
            ("In", ("a",), {}, False),
            ("NotIn", ("a",), {"k": "b"}, True),
            ("NotIn", ("a",), {"k": "a"}, False),
            ("NotIn", ("a",), {}, True),
            ("Exists", (), {"k": ""}, True),
            ("Exists", (), {}, False),
            ("DoesNotExist", (), {}, True),
            ("DoesNotExist", (), {"k": "a"}, False),
        ],
    )
    def test_match_expressions_follow_kubernetes(self, operator, values, labels, selected):
        selector = LabelSelector(
            match_expressions=(SelectorRequirement(key="k", operator=operator, values=values),)
        )
        found = tree.build([domain("a", node_selector=selector)], NOON)
        assert (found.member("n", labels).domain == "a") is selected
