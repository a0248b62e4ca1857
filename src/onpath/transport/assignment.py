"""Many small transportation problems at once: exact plans between windows of unequal length.

    min Σ_ij f_ij·cost_ij   over whole numbers f ≥ 0 with row sums m (n rows) and column sums n (m columns)

Successive shortest paths (the Hungarian method with capacities): potentials u, v keep every reduced cost
cost_ij − u_i − v_j at least 0, and 0 where mass flows; each round sends the mass of one unfinished row along
a shortest path to a column with room, back over columns that pass some of theirs on. All windows take their
rounds in lockstep, so that one NumPy call serves hundreds of them.

Shape suffixes: W windows, n rows, m columns.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def transportation(cost_Wnm: Floats) -> Floats:
    """Optimal plans of mass 1 with uniform marginals; all windows of one size [n, m]."""
    windows, n, m = cost_Wnm.shape
    state = _State(
        cost=cost_Wnm,
        flow=np.zeros((windows, n, m), dtype=np.int64),
        supply=np.full((windows, n), m, dtype=np.int64),
        demand=np.full((windows, m), n, dtype=np.int64),
        u=np.zeros((windows, n)),
        v=cost_Wnm.min(1),
    )
    _greedy(state)
    open_W = np.flatnonzero(state.supply.any(-1))
    while len(open_W):
        _augment(state, open_W)
        open_W = open_W[state.supply[open_W].any(-1)]
    plan: Floats = state.flow / (n * m)
    return plan


@dataclass
class _State:
    cost: Floats  # [W, n, m]
    flow: Ints  # [W, n, m]
    supply: Ints  # [W, n] left to send
    demand: Ints  # [W, m] left to take
    u: Floats  # [W, n]
    v: Floats  # [W, m]


def _greedy(state: _State) -> None:
    """Row by row, to the column of least reduced cost, as much as fits: most of the mass."""
    every = np.arange(len(state.cost))
    for i in range(state.cost.shape[1]):
        reduced = state.cost[:, i] - state.v
        j = reduced.argmin(-1)
        state.u[:, i] = reduced[every, j]
        sent = np.minimum(state.supply[:, i], state.demand[every, j])
        state.flow[every, i, j] += sent
        state.supply[:, i] -= sent
        state.demand[every, j] -= sent


def _augment(state: _State, at: Ints) -> None:
    """One round of the windows `at`: mass along a shortest path from the first row with supply."""
    every = np.arange(len(at))
    source = (state.supply[at] > 0).argmax(-1)
    found = _shortest(state, at, source)
    reach = found.column_distance[every, found.sink]
    # By what each settled node is nearer than the sink: no reduced cost falls below 0, and those along the
    # path become 0.
    state.u[at] += np.where(found.row_done, reach[:, None] - found.row_distance, 0.0)
    state.v[at] -= np.where(found.column_done, reach[:, None] - found.column_distance, 0.0)
    rows, columns, back = _path(found, source)
    sent = np.minimum(state.supply[at, source], state.demand[at, found.sink])
    # No more than each edge that is taken back carries; windows whose path is shorter are not `on` any more.
    for i, j, on in zip(rows, columns, back, strict=True):
        through = state.flow[at, i, j]
        sent = np.where(on, np.minimum(sent, through), sent)
    column = found.sink
    for i, j, on in zip(rows, columns, back, strict=True):
        live = at[on]
        state.flow[live, i[on], column[on]] += sent[on]
        state.flow[live, i[on], j[on]] -= sent[on]
        column = np.where(on, j, column)
    state.flow[at, source, column] += sent
    state.supply[at, source] -= sent
    state.demand[at, found.sink] -= sent


@dataclass
class _Search:
    row_distance: Floats  # [A, n]
    row_parent: Ints  # [A, n] the column that a row was reached over; −1 for the source
    row_done: Bools  # [A, n]
    column_distance: Floats  # [A, m]
    column_parent: Ints  # [A, m] the row before
    column_done: Bools  # [A, m]
    sink: Ints  # [A]


def _shortest(state: _State, at: Ints, source: Ints) -> _Search:
    """Dijkstra in every window. A row is reached for nothing over a column that it sends mass to."""
    windows, every = len(at), np.arange(len(at))
    n, m = state.cost.shape[1:]
    search = _Search(
        row_distance=np.zeros((windows, n)),
        row_parent=np.full((windows, n), -1, dtype=np.int64),
        row_done=np.zeros((windows, n), dtype=bool),
        column_distance=np.full((windows, m), np.inf),
        column_parent=np.zeros((windows, m), dtype=np.int64),
        column_done=np.zeros((windows, m), dtype=bool),
        sink=np.full(windows, -1, dtype=np.int64),
    )
    search.row_done[every, source] = True
    waiting = np.zeros((windows, n), dtype=bool)  # reached, columns not yet looked at
    waiting[every, source] = True
    live = every
    while len(live):
        relax = waiting[live].any(-1)
        _relax(state, at, search, waiting, live[relax])
        live = np.concatenate([live[relax], _scan(state, at, search, waiting, live[~relax])])
    return search


def _relax(state: _State, at: Ints, search: _Search, waiting: Bools, live: Ints) -> None:
    """Looks at the columns from one waiting row of each window."""
    if not len(live):
        return
    i, where = waiting[live].argmax(-1), at[live]
    waiting[live, i] = False
    start = search.row_distance[live, i][:, None]
    reduced = state.cost[where, i] - state.u[where, i][:, None] - state.v[where]
    ahead = start + np.maximum(reduced, 0.0)  # rounding must not run backwards
    nearer = (ahead < search.column_distance[live]) & ~search.column_done[live]
    search.column_distance[live] = np.where(nearer, ahead, search.column_distance[live])
    search.column_parent[live] = np.where(nearer, i[:, None], search.column_parent[live])


def _scan(state: _State, at: Ints, search: _Search, waiting: Bools, live: Ints) -> Ints:
    """Settles the nearest column of each window; returns the windows whose column had no room."""
    if not len(live):
        return live
    j = np.where(search.column_done[live], np.inf, search.column_distance[live]).argmin(-1)
    search.column_done[live, j] = True
    room = state.demand[at[live], j] > 0
    search.sink[live[room]] = j[room]
    live, j = live[~room], j[~room]
    fresh = (state.flow[at[live], :, j] > 0) & ~search.row_done[live]
    distance = search.column_distance[live, j][:, None]
    search.row_distance[live] = np.where(fresh, distance, search.row_distance[live])
    search.row_parent[live] = np.where(fresh, j[:, None], search.row_parent[live])
    search.row_done[live] |= fresh
    waiting[live] |= fresh
    return live


def _path(search: _Search, source: Ints) -> tuple[list[Ints], list[Ints], list[Bools]]:
    """Backwards from the sink: rows, columns that they take mass back from, where the path goes on."""
    every, column = np.arange(len(source)), search.sink
    rows: list[Ints] = []
    columns: list[Ints] = []
    goes_on: list[Bools] = []
    while True:
        row = search.column_parent[every, column]
        on = row != source
        if goes_on:
            on &= goes_on[-1]
        if not on.any():
            return rows, columns, goes_on
        before = np.where(on, search.row_parent[every, row], column)
        rows.append(row)
        columns.append(before)
        goes_on.append(on)
        column = before
