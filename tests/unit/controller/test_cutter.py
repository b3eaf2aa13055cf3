"""A plan that was made on a higher limit than the one in force raises nothing any more."""

import msgspec

from tokenfactory.api.meta import ObjectMeta
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.controller.cutting import Cutter


def hall(limit: str) -> PowerDomain:
    return msgspec.convert({"metadata": ObjectMeta(name="hall"), "spec": {"limit": limit}}, PowerDomain)


def test_a_limit_that_rose_for_a_moment_only_leaves_no_raise_behind():
    domains = {("", "hall"): hall("100kW")}
    cutter = Cutter(lambda: domains, dict, None)  # type: ignore[arg-type]

    def change(limit: str) -> None:
        domains["", "hall"] = hall(limit)
        cutter.domain_changed()

    cutter.domain_changed()
    assert cutter.generation() == cutter.generation()
    change("200kW")
    observed = cutter.generation()
    change("200kW")
    assert cutter.generation() == observed, "nothing fell"
    change("100kW")
    assert cutter.generation() != observed, "planned on 200 kW"
    again = cutter.generation()
    change("200kW")
    change("100kW")
    assert cutter.generation() == again, "nobody has seen the 200 kW"
    domains.clear()
    cutter.domain_changed()
    assert cutter.generation() != again, "a domain that is gone hands out nothing"
