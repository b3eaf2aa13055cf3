"""The prices of purses: the lowest at which none is overdrawn.

They are where a convex function has its least value: the *dual* of what is bought. Its slopes are what each purse has
left, and one clearing of the market tells them. With edges on all pieces (`goods.Edge`) the slopes change without
jumps, and the market also tells how they change: so Newton's method finds the prices of all purses together, also
where GPUs pay from several. It begins with edges so wide that they overlap, where it cannot get lost, and ends with
edges so narrow that they cost nothing.

A price is a word (`goods.Adder`), found letter by letter, as no letter is touched by what later ones decide. What ties
in a letter is made to tie exactly (`ties.py`), and later letters decide among it; the edges of the last one share out
what ties in all.
"""

import numpy as np

from tokenfactory.planning.power.goods import TICKS, BoolArray, Edge, FloatArray, IntArray
from tokenfactory.planning.power.purses import NARROW, Look, Site
from tokenfactory.planning.power.ties import made_exact

# More than any piece is worth, in a letter of a price.
PROHIBITIVE = 1 << 56
# The edges to begin with. Where many pieces are for sale, edges that overlap many others are slow to clear: no wider
# there than so many pieces or so many parts of pieces ask for. And how much narrower they get each time.
WIDEST = 1.0
OVERLAPS = 2.0
PARTS = 150_000
NARROWING = 4.0
# How much of its room a purse may have left, or be over, on the way to the narrow edges.
NEAR_ENOUGH = 0.001
# Steps with edges of one width; how far the first may go, in parts of the highest price; and how often one is shortened.
MOST_STEPS = 20
MOST_LAST_STEPS = 24
FIRST_REACH = 0.25
SHORTENINGS = 12
# As much as if so much of a purse's room were sold evenly at all prices: where nothing tells how spending changes.
LEAST_SLOPE = 0.01
# How often the search is begun anew, with so many times more to spare for a purse that was not met.
TRIES = 6
MORE_SPARE = 5.0
# Clearings that all of it may take: a plan that comes too late is worth nothing.
MOST_CLEARINGS = 1000
# Where they were not enough: the steps in which a price passes all that is for sale, and clearings to raise all of them.
RAISES = 21
MOST_RAISES = 300


def find_prices(site: Site, before: IntArray | None = None) -> Look:
    """The market at the right prices. `before`: prices (by purse and letter) that may be almost right."""
    look = nearest = site.free()
    budgets = site.least + site.room
    spare = site.slack.copy()
    for _ in range(TRIES):
        over = look.spent > budgets
        if not over.any():
            return look
        if site.clearings >= MOST_CLEARINGS:
            break
        spare[over & (look.prices != 0).any(axis=1)] *= MORE_SPARE
        look = _letter_by_letter(site, budgets - spare, before)
        nearest = min(nearest, look, key=lambda each: int(np.maximum(each.spent - budgets, 0).sum()))
    look = _raised(site, nearest, budgets)
    # A purse buys nothing rather than too much. What it leaves may overdraw another, so all are asked again.
    while (over := (look.spent > budgets) & (look.prices[:, 0] < PROHIBITIVE)).any():
        prices = look.prices.copy()
        prices[np.argmax(over)] = 0
        prices[np.argmax(over), 0] = PROHIBITIVE
        look = site.look(prices)
    return look


def _raised(site: Site, look: Look, budgets: IntArray) -> Look:
    """From the nearest that a search has come: the prices of what is still overdrawn rise until nothing is.

    What one purse leaves may overdraw others, whose turn it is then. A purse's steps double, so that it has few to go: first
    in the last letter, and in the one before that once its price there is above all that is for sale.
    """
    unit = [
        int(site.goods.piece_ticks[site.letter == letter].max(initial=0)) for letter in range(site.letters)
    ]
    letters = [letter for letter in reversed(range(site.letters)) if unit[letter]]
    steps = np.zeros(len(site.purses), dtype=np.int64)
    for _ in range(MOST_RAISES):
        over = np.flatnonzero((look.spent > budgets) & (steps < RAISES * len(letters)))
        if not over.size:
            break
        prices = look.prices.copy()
        for purse in over.tolist():
            which, doubled = divmod(int(steps[purse]), RAISES)
            prices[purse, letters[which]] += int(unit[letters[which]] * NARROW) << doubled
        steps[over] += 1
        look = site.look(prices)
    return look


def _letter_by_letter(site: Site, aims: FloatArray, before: IntArray | None) -> Look:
    prices = np.zeros((len(site.purses), site.letters), dtype=np.int64)
    prices[(site.slack > 0) & (site.room <= 4 * site.slack), 0] = PROHIBITIVE
    look = site.look(prices)
    for letter in range(site.letters):
        last = letter == site.letters - 1
        if last or (site.letter == letter).any():
            search = _Search(site, prices, letter, aims)
            look = search.run(None if before is None else before[:, letter])
            prices = (look if last else made_exact(site, look, search.who)).prices
    return look


class _Search:
    """The prices of one letter, after those of the letters before it."""

    def __init__(self, site: Site, prices: IntArray, letter: int, aims: FloatArray) -> None:
        sold = site.letter == letter
        self.who = np.flatnonzero(prices[:, 0] != PROHIBITIVE)
        self._site, self._prices, self._letter = site, prices, letter
        self._bound: BoolArray = (prices != 0).any(axis=1)[self.who]
        """Who is spent on earlier letters already: all of its budget, and its price here may be below nothing."""
        self._unit = float(site.goods.piece_ticks[sold].max()) if sold.any() else float(TICKS)
        """Ticks that prices are counted in."""
        self._aims, self._room = aims[self.who], site.room[self.who].astype(np.float64)
        self._slack = site.slack[self.who]
        self._widest = min(WIDEST, max(OVERLAPS, PARTS / max(site.offers, 1)) / max(int(sold.sum()), 1))

    def run(self, before: IntArray | None) -> Look:
        at = np.zeros(self.who.size) if before is None else before[self.who] / self._unit
        steps = 0 if before is None else MOST_STEPS
        _, look, found = self._newton(at, NARROW, self._slack, steps, FIRST_REACH)
        return look if found else self._narrowing()

    def _narrowing(self) -> Look:
        at = before = np.zeros(self.who.size)
        edge, reach = self._widest, FIRST_REACH
        while edge > NARROW:
            found, _, _ = self._newton(at, edge, NEAR_ENOUGH * self._room, MOST_STEPS, reach)
            # As edges narrow prices go to their places on straight lines.
            moved = np.where((found != 0) & (before != 0), (found - before) / NARROWING, 0.0)
            at, before, reach, edge = self._within(found + moved), found, edge, edge / NARROWING
        return self._newton(at, NARROW, self._slack, MOST_LAST_STEPS, reach)[1]

    def _within(self, at: FloatArray) -> FloatArray:
        """Nobody is paid for buying, but for what ties."""
        most = float(self.who.size + 1)
        return np.clip(at, np.where(self._bound, -most, 0.0), most)

    def _moving(self, at: FloatArray, over: FloatArray) -> BoolArray:
        """Whose price is to be found: nobody's who has something left and no price."""
        return self._bound | (at > 0) | (over > 0)

    def _met(self, at: FloatArray, over: FloatArray, slack: FloatArray) -> bool:
        moving = self._moving(at, over)
        return bool((np.abs(over[moving]) <= slack[moving]).all())

    def _look(self, at: FloatArray, edge: float) -> tuple[Look, FloatArray]:
        """The market at a point, and what each purse is over its aim there."""
        prices = self._prices.copy()
        prices[self.who, self._letter] = np.rint(at * self._unit).astype(np.int64)
        look = self._site.look(prices, Edge(self._letter, edge))
        return look, look.spent[self.who] - self._aims

    def _newton(
        self, at: FloatArray, edge: float, slack: FloatArray, most: int, reach: float
    ) -> tuple[FloatArray, Look, bool]:
        """From `at` to where no purse is over its aim and none that has a price is below; whether it came there.

        `reach`: how far a step goes at most. Further where spending changes less than the slopes say.
        """
        look, over = self._look(at, edge)
        least_slope = LEAST_SLOPE
        for _ in range(most):
            if self._met(at, over, slack) or self._site.clearings >= MOST_CLEARINGS:
                break
            step = self._step(at, look, over, reach, least_slope)
            there, after, gained, left = at, over, 0.0, 0.0
            for _ in range(SHORTENINGS):
                there = self._within(at + step)
                look, after = self._look(there, edge)
                gained, left = float(over @ (there - at)), float(after @ (there - at))
                if left >= -gained / 2 or gained <= 0:
                    break
                step *= min(max(gained / (gained - left), 0.1), 0.5)
                reach, least_slope = float(np.abs(step).max()), LEAST_SLOPE
            if left > gained / 2:
                reach, least_slope = reach * 4, least_slope / 8
            if (np.rint(there * self._unit) == np.rint(at * self._unit)).all():
                break
            at, over = there, after
        return at, look, self._met(at, over, slack)

    def _step(
        self, at: FloatArray, look: Look, over: FloatArray, reach: float, least_slope: float
    ) -> FloatArray:
        slopes = self._site.slopes(look)[np.ix_(self.who, self.who)] * self._unit
        # Nobody spends more at a higher price: a slope below nothing is rounding.
        np.fill_diagonal(slopes, np.maximum(np.diag(slopes), 0.0))
        slopes += np.diag(np.maximum(least_slope * self._room, 1.0))
        moving = np.flatnonzero(self._moving(at, over))
        step = np.zeros(at.size)
        step[moving] = np.linalg.lstsq(slopes[np.ix_(moving, moving)], over[moving], rcond=None)[0]
        step = _at_most(step, reach)
        if over @ (self._within(at + step) - at) <= 0:
            step = _at_most(np.where(self._moving(at, over), over / np.diag(slopes), 0.0), reach)
        return step


def _at_most(step: FloatArray, reach: float) -> FloatArray:
    return step * min(1.0, reach / max(float(np.abs(step).max()), 1e-12))
