"""Which prices of purses tie in a letter, to the tick, so that later letters can decide among what ties.

With narrow edges (`goods.Edge`) what is bought in part shows the ties: pieces that one domain buys in part have one
price, and what a domain with watts left buys in part is worth no more than the purses' prices. Each tie is an equation
in the prices of that letter. They are solved exactly.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction

import numpy as np

from tokenfactory.planning.power.goods import TICKS_APART, IntArray
from tokenfactory.planning.power.purses import Look, Site

Tie = tuple[int, ...]
"""How often each purse's price counts, and what they make together."""


def made_exact(site: Site, look: Look, who: IntArray) -> Look:
    """The same, with prices of these purses in the letter of its edge at which what is bought in part ties."""
    letter = look.edge.letter
    paying = who[look.prices[who, letter] != 0]
    prices = look.prices.copy()
    near = [round(price / TICKS_APART) * TICKS_APART for price in prices[paying, letter].tolist()]
    prices[paying, letter] = _solved(near, _ties(site, look, paying))
    return replace(look, prices=prices)


def _solved(near: list[int], ties: Iterable[Tie]) -> list[int]:
    """Prices at which these ties hold, those before the others where not all can; what no tie tells stays."""
    solved: dict[int, list[Fraction]] = {}
    for tie in ties:
        row = [Fraction(each) for each in tie]
        for at, known in solved.items():
            row = _less(row, row[at], known)
        pivot = next((at for at, each in enumerate(row[:-1]) if each), -1)
        if pivot < 0:
            continue  # It says nothing new; or it is a tie by chance, within the width of the edges.
        row = [each / row[pivot] for each in row]
        solved = {at: _less(known, known[pivot], row) for at, known in solved.items()}
        solved[pivot] = row
    found = list(near)
    for pivot, row in solved.items():
        others = sum(row[at] * each for at, each in enumerate(near) if at not in solved)
        found[pivot] = round(row[-1] - others)
    return found


def _less(row: list[Fraction], times: Fraction, other: list[Fraction]) -> list[Fraction]:
    return [a - times * b for a, b in zip(row, other, strict=True)] if times else row


def _ties(site: Site, look: Look, paying: IntArray) -> list[Tie]:
    """Those that hold in most places first."""
    goods, fleet, order = site.goods, site.fleet, look.clearing.market.order
    own = np.where(site.letter == look.edge.letter, goods.piece_ticks, 0)
    words = np.concatenate((site.members[paying].T[goods.piece_class], own[:, None]), axis=1)
    piece = np.searchsorted(
        _named(goods.piece_class, goods.piece_segment), _named(order.piece_class, order.piece_segment)
    )
    in_cell: dict[int, list[int]] = {}
    for cell, number in zip(order.piece_cell.tolist(), piece.tolist(), strict=True):
        in_cell.setdefault(cell, []).append(number)
    cells, _, binding = look.clearing.path_levels
    standing: dict[int, set[int]] = {}
    for domain, number in zip(fleet.domain.tolist(), fleet.class_index.tolist(), strict=True):
        standing.setdefault(int(binding[domain]), set()).add(number)
    votes: Counter[Tie] = Counter()
    for domain, classes in standing.items():
        tied = [at for at in in_cell.get(int(cells[domain]), ()) if int(goods.piece_class[at]) in classes]
        votes.update(tuple((words[at] - words[tied[0]]).tolist()) for at in tied[1:])
    unbound = np.unique(fleet.class_index[cells[fleet.domain] >= order.cells])
    worthless = site.worth_nothing(look) & np.isin(goods.piece_class, unbound)
    votes.update(tuple(word) for word in words[worthless].tolist())
    return [tie for tie, _ in votes.most_common() if any(tie[:-1])]


def _named(class_index: IntArray, segment: IntArray) -> IntArray:
    """One number for each piece; they rise with the pieces' own."""
    return (class_index << 16) | segment
