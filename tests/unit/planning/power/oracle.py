"""The same market as a linear (or mixed-integer) programme for HiGHS: the judge of what is optimal."""

import highspy
import numpy as np

from tokenfactory.planning.power.market import Market


def solve_lp(value, upper, rows, limits, kinds=None):
    """max value·x, 0 ≤ x ≤ upper, Σ row ≤ limit. `rows` are lists of (columns, coefficients)."""
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(value), len(rows)
    lp.sense_ = highspy.ObjSense.kMaximize
    lp.col_cost_ = np.asarray(value, dtype=float)
    lp.col_lower_ = np.zeros(len(value))
    lp.col_upper_ = np.asarray(upper, dtype=float)
    lp.row_lower_ = np.full(len(rows), -highspy.kHighsInf)
    lp.row_upper_ = np.asarray(limits, dtype=float)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.concatenate(([0], np.cumsum([len(c) for c, _ in rows]))).astype(np.int32)
    lp.a_matrix_.index_ = np.concatenate([c for c, _ in rows] or [[]]).astype(np.int32)
    lp.a_matrix_.value_ = np.concatenate([v for _, v in rows] or [[]]).astype(float)
    if kinds is not None:
        integer, continuous = highspy.HighsVarType.kInteger, highspy.HighsVarType.kContinuous
        lp.integrality_ = [integer if k else continuous for k in kinds]
        solver.setOptionValue("mip_rel_gap", 1e-5)
        solver.setOptionValue("time_limit", 20.0)
    solver.passModel(lp)
    solver.run()
    status = solver.getModelStatus()
    assert status in {highspy.HighsModelStatus.kOptimal, highspy.HighsModelStatus.kTimeLimit}, status
    bound = solver.getInfo().mip_dual_bound if kinds is not None else solver.getObjectiveValue()
    return solver.getObjectiveValue(), bound, np.array(solver.getSolution().col_value)


def optimum_by_stage(market: Market, limits, factory_budgets=None, shared=()):
    """The best value of every stage (SLO floors by band, then what lies above by band), each after those before.

    `shared` are budgets of some pairs of the fleet: (mask by pair, milliwatts).
    """
    goods, fleet, forest = market.order.goods, market.fleet, market.forest
    column_pair, column_piece = [], []
    for pair, number in enumerate(fleet.class_index):
        for piece in np.flatnonzero(goods.piece_class == number):
            column_pair.append(pair)
            column_piece.append(piece)
    pair, piece = np.array(column_pair, dtype=int), np.array(column_piece, dtype=int)
    # Watts rather than milliwatts: the solver's tolerances are absolute.
    upper = fleet.gpus[pair] * goods.piece_width[piece] / 1000
    density = goods.piece_ticks[piece] / goods.piece_ticks.max() if piece.size else np.zeros(0)
    rows, bounds = [], []
    for position in range(forest.count):
        inside = np.array([position in forest.path(int(d)) for d in fleet.domain], dtype=bool)
        columns = np.flatnonzero(inside[pair]) if piece.size else np.zeros(0, dtype=int)
        rows.append((columns, np.ones(columns.size)))
        bounds.append(max(int(limits[position] - market.base[position]), 0) / 1000)
    for factory, budget in (factory_budgets or {}).items():
        columns = np.flatnonzero(goods.piece_factory[piece] == goods.factories.index(factory))
        rows.append((columns, np.ones(columns.size)))
        bounds.append(max(budget - factory_base(market, factory), 0) / 1000)
    for mask, budget in shared:
        columns = np.flatnonzero(mask[pair])
        rows.append((columns, np.ones(columns.size)))
        least = int((fleet.gpus * goods.minimum[fleet.class_index])[mask].sum())
        bounds.append(max(budget - least, 0) / 1000)
    results = []
    for stage in range(goods.stages):
        objective = np.where(goods.piece_stage[piece] == stage, density, 0.0)
        best, _, _ = solve_lp(objective, upper, rows, bounds)
        results.append(best)
        # What earlier stages reached may not be given up for later ones.
        columns = np.flatnonzero(objective)
        rows.append((columns, -objective[columns]))
        bounds.append(-best * (1 - 1e-9) + 1e-5)
    return np.array(results)


def factory_base(market: Market, factory: str) -> int:
    goods, fleet = market.order.goods, market.fleet
    mine = np.array([goods.classes[c].factory == factory for c in fleet.class_index], dtype=bool)
    return int((fleet.gpus * goods.minimum[fleet.class_index])[mine].sum())


def reached_by_stage(market: Market, caps):
    """What these caps are worth, stage by stage, in the oracle's unit."""
    goods, fleet = market.order.goods, market.fleet
    reached = np.zeros(goods.stages)
    for number, each in enumerate(goods.classes):
        mine = fleet.class_index == number
        for piece in np.flatnonzero(goods.piece_class == number):
            low = each.milliwatts[goods.piece_segment[piece]]
            bought = np.clip(caps[mine] - low, 0, goods.piece_width[piece])
            watts = float((bought * fleet.gpus[mine]).sum()) / 1000
            reached[goods.piece_stage[piece]] += watts * goods.piece_ticks[piece] / goods.piece_ticks.max()
    return reached
