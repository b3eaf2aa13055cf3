"""Deliberate bugs: each is one rule of the protocol left out. The searches must find every one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import msgspec
from tests.fault.parts import Kit

from tokenfactory.api.gpu_node import Fence
from tokenfactory.controller.plan.oversubscribing import oversubscribe
from tokenfactory.planning.power import governor, ledger, lines, publish
from tokenfactory.planning.power.oversubscription import REACTION_MILLISECONDS
from tokenfactory.planning.power.sheets import History


def _read_back_what_was_asked(memory, decision, enforced):
    asked = {
        u: o.cap_milliwatts if o.cap_milliwatts is not None else enforced[u] for u, o in decision.caps.items()
    }
    return governor.read_back(memory, decision, asked)


def _silence_is_a_fence(domains, found, nodes, facts, leadership):
    def fenced(node):
        if facts[node.metadata.name].heard:
            return node
        fence = Fence(method="PowerOff", by="nobody", at="", boot_id=node.status.boot_id)
        return lines.replace_struct(node, fence=fence)

    return ledger.observe(domains, found, [fenced(node) for node in nodes], facts, leadership)


def _govern_without_hold(memory, view, now):
    if view.sheets is None:
        return governor.govern(memory, view, now)
    endless = {name: replace(sheet, hold_milliseconds=10**12) for name, sheet in view.sheets.items()}
    return governor.govern(memory, replace(view, sheets=endless), now)


def _same_epoch_again(book, targets):
    plan = publish.plan_sheets(book, targets)
    return replace(plan, writes=tuple(_at_the_same_epoch(book, write) for write in plan.writes))


def _at_the_same_epoch(book, write):
    if write.resource_version is None:
        return write
    epoch = book.sheets[write.spec.domain].spec.epoch
    earlier = tuple(
        msgspec.structs.replace(entry, through=max(1, min(entry.through, epoch - 1)))
        for entry in write.spec.earlier
    )
    return replace(write, spec=msgspec.structs.replace(write.spec, epoch=epoch, earlier=earlier))


def _credit_for_expired_hold(domains, found, nodes, facts, leadership):
    book = ledger.observe(domains, found, nodes, facts, leadership)
    entries = dict(book.entries)
    for name, entry in entries.items():
        if not entry.facts.heard and entry.kind == "Charged":
            fallen = tuple(_fallen(book, entry.line, demand) for demand in entry.line.demands)
            entries[name] = replace(entry, line=replace(entry.line, demands=fallen))
    return ledger._summed(replace(book, entries=entries))


def _fallen(book, line, demand):
    fallback = min((_fallback(book, domain, demand.class_name) for domain in line.domains), default=0)
    cap = min(max(fallback, demand.low), demand.high)
    return replace(demand, low=cap, high=cap, base=cap, unbounded=cap)


def _fallback(book, domain, class_name):
    sheet = book.sheets.get(domain)
    found = {cap.class_name: cap.fallback for cap in sheet.spec.caps} if sheet is not None else {}
    return found.get(class_name, 0)


def _only_present_sheets(domains, found, nodes, facts, leadership):
    bare = {
        name: msgspec.structs.replace(sheet, spec=msgspec.structs.replace(sheet.spec, earlier=()))
        for name, sheet in found.items()
    }
    obedient = [_said_nothing(node) for node in nodes]
    return replace(ledger.observe(domains, bare, obedient, facts, leadership), sheets=found)


def _said_nothing(node):
    gpus = tuple(msgspec.structs.replace(gpu, enforced_milliwatts=0) for gpu in node.status.gpus)
    return msgspec.structs.replace(node, status=msgspec.structs.replace(node.status, gpus=gpus))


def _same_boot_forever(memory, view, now):
    if view.status is not None:
        view = replace(view, status=msgspec.structs.replace(view.status, boot_id=view.boot_id))
    return governor.govern(memory, view, now)


def _trust_what_was_capped_once(memory, decision, enforced):
    if memory.found_own_caps:
        return _read_back_what_was_asked(memory, decision, enforced)
    return governor.read_back(memory, decision, enforced)


def _start_before_the_boot_is_known(memory, view, now):
    memory, decision = governor.govern(memory, view, now)
    if view.status is not None and view.spec is not None and view.spec.fence is None:
        known = replace(view, status=msgspec.structs.replace(view.status, boot_id=view.boot_id))
        decision = replace(decision, startable=governor.govern(memory, known, now)[1].startable)
    return memory, decision


def _move_at_once(node, path):
    former = tuple(
        old for old in dict.fromkeys((*node.spec.former_paths, node.spec.path)) if old not in ((), path)
    )
    return msgspec.structs.replace(node.spec, path=path, former_paths=former[-4:])


def _forget_the_former_path(node, path):
    return msgspec.structs.replace(node.spec, path=path, former_paths=())


def _collect_at_once(node, facts):
    return msgspec.structs.replace(node.spec, pods=tuple(pod for pod in node.spec.pods if not pod.released))


@dataclass(frozen=True, slots=True)
class _Credulous(History):
    """Believes that whoever acknowledged nothing, or something forgotten, obeys the latest sheets."""

    def highest(self, acked):
        return History.highest(self, max(acked, self.spec.complete_from))


def _believe_the_silent(domains, found, nodes, facts, leadership):
    book = ledger.observe(domains, found, nodes, facts, leadership)
    histories = {
        name: _Credulous(sheet.spec, tuple(entry.through for entry in sheet.spec.earlier))
        for name, sheet in found.items()
    }
    return ledger._summed(replace(book, histories=histories))


def _sheets_begin_anew(domains, found, nodes, facts, leadership):
    return ledger.observe(domains, found, nodes, facts, replace(leadership, known_version=0))


def _without_a_brake(seen, grid, book, known):
    laid, ceilings, known = oversubscribe(seen, grid, book, known)
    margins = {name: replace(margin, braking=False) for name, margin in laid.margins.items()}
    return _under(laid, ceilings, margins, known)


def _under(laid, book, margins, known):
    domains = {
        name: replace(domain, usable_milliwatts=margins[name].ceiling_milliwatts)
        if name in margins
        else domain
        for name, domain in book.domains.items()
    }
    return replace(laid, domains=domains, margins=margins), replace(book, domains=domains), known


def _silent_by_their_last_draw(seen, grid, book, known):
    silent = {name for name, entry in book.entries.items() if not entry.facts.heard}
    entries = {n: replace(each, facts=replace(each.facts, heard=True)) for n, each in book.entries.items()}
    laid, _, known = oversubscribe(seen, grid, replace(book, entries=entries), _renewed(seen, known, silent))
    return _under(laid, book, laid.margins, known)


def _old_reports_hold(seen, grid, book, known):
    return oversubscribe(seen, grid, book, _renewed(seen, known, set(book.entries)))


def _moments_alone(seen, grid, book, known):
    """What nodes drew between two reports is not looked at."""
    entries = {
        name: replace(
            entry, node=msgspec.structs.replace(entry.node, status=_of_its_moment(entry.node.status))
        )
        for name, entry in book.entries.items()
    }
    laid, _, known = oversubscribe(seen, grid, replace(book, entries=entries), known)
    return _under(laid, book, laid.margins, known)


def _of_its_moment(status):
    return msgspec.structs.replace(status, peak_milliwatts=0)


def _renewed(seen, known, nodes):
    """The last reports of these nodes as if they had come just now."""
    watches, reports = known
    now = seen.snapshot.milliseconds
    return watches, {name: (said, now if name in nodes else at) for name, (said, at) in reports.items()}


def _breakers_bear_it_without_end(seen, grid, book, known):
    """As if neither hold nor the brake's reaction took any time."""
    laid, ceilings, known = oversubscribe(seen, grid, book, known)
    margins = {
        name: replace(margin, breaker=replace(margin.breaker, hold_milliseconds=-REACTION_MILLISECONDS))
        for name, margin in laid.margins.items()
    }
    return _under(laid, ceilings, margins, known)


BUGS: Mapping[str, Kit] = {
    "skip read-back": Kit(read_back=_read_back_what_was_asked),
    "drop fencing": Kit(observe=_silence_is_a_fence),
    "ignore hold": Kit(govern=_govern_without_hold),
    "reuse an epoch": Kit(plan_sheets=_same_epoch_again, epoch_rule=False),
    "credit an expired hold": Kit(observe=_credit_for_expired_hold),
    "raise before lower": Kit(observe=_only_present_sheets),
    "trust a cap across a reboot": Kit(govern=_same_boot_forever, read_back=_trust_what_was_capped_once),
    "skip the claim": Kit(claims=False),
    "start before the boot is known": Kit(govern=_start_before_the_boot_is_known),
    "credit a path left and taken again": Kit(moved=_move_at_once),
    "forget the former path": Kit(moved=_forget_the_former_path),
    "collect a pod before the agent said so": Kit(collected=_collect_at_once),
    "believe who acknowledged nothing": Kit(observe=_believe_the_silent),
    "forget that a sheet was there": Kit(observe=_sheets_begin_anew),
    "ignore the brake": Kit(oversubscribe=_without_a_brake),
    "count the silent by their last draw": Kit(oversubscribe=_silent_by_their_last_draw),
    "believe an old report": Kit(oversubscribe=_old_reports_hold),
    "believe the moment of a report alone": Kit(oversubscribe=_moments_alone),
    "oversubscribe whatever hold is": Kit(oversubscribe=_breakers_bear_it_without_end),
}
"""By name. The first seven are those that the issue of this product's safety names."""
