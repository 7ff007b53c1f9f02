"""The solver against brute force on small problems, and against an ILP (HiGHS) on middle-sized ones."""

import contextlib
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import LinearConstraint, milp

from autoshard.errors import AutoshardError
from autoshard.solver import InfeasibleError, Problem, Solution, solve

SHAPES = {
    "tree": lambda n: [((v - 1) // 2, v) for v in range(1, n)],
    "cycle": lambda n: [(v, v + 1) for v in range(n - 1)] + [(0, n - 1)] * (n > 2),
    "grid": lambda n: [(v, v + 1) for v in range(n - 1) if v % 2 == 0] + [(v, v + 2) for v in range(n - 2)],
    "complete": lambda n: list(itertools.combinations(range(n), 2)),
    "unconnected": lambda n: [],
}


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to six variables with whole-number costs, so that sums are exact whatever their order."""
    scopes = SHAPES[draw(st.sampled_from(sorted(SHAPES)))](count := draw(st.integers(1, 6)))
    is_uniform = draw(st.booleans())  # one size and few distinct tables: what interning has to get right
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = [3] * count if is_uniform else [int(s) for s in rng.integers(1, 5, count)]
    forbidden = draw(st.sampled_from([0.0, 0.1, 0.4]))

    def table(*shape: int) -> np.ndarray:
        return np.where(rng.random(shape) < forbidden, math.inf, rng.integers(-3, 9, shape).astype(float))

    shared = [table(3, 3) for _ in range(2)]
    pairs: dict = {(u, v): shared[(u + v) % 2] if is_uniform else table(sizes[u], sizes[v]) for u, v in scopes}
    if count > 2 and draw(st.booleans()):  # tables over three variables
        threes = draw(st.lists(st.sampled_from(list(itertools.combinations(range(count), 3))), max_size=3, unique=True))
        pairs |= {scope: table(*(sizes[v] for v in scope)) for scope in threes}
    held = {scope: rng.integers(0, 9, pairs[scope].shape).astype(float) for scope in pairs if rng.random() < 0.5}
    order = list(rng.permutation(count))
    blocks = (order[: count // 2], order[count // 2 :]) if draw(st.booleans()) else ()
    return Problem(
        costs=tuple(table(s) for s in sizes),
        pairs=pairs,
        memory_bytes=tuple(rng.integers(0, 9, s).astype(float) for s in sizes),
        pair_bytes=held,
        blocks=tuple(tuple(sorted(map(int, block))) for block in blocks),
    )


def middle_problem(seed: int, count: int = 25, size: int = 4, reach: int = 3, has_more: bool = False) -> Problem:
    """A chain whose variables also meet some of the `reach` before them: treewidth up to `reach`.

    has_more: tables over three variables too, and memory on every table.
    """
    rng = np.random.default_rng(seed)
    scopes = [(u, v) for v in range(count) for u in range(max(0, v - reach), v) if u == v - 1 or rng.random() < 0.4]
    pairs = {scope: np.where(rng.random((size, size)) < 0.08, math.inf, rng.random((size, size))) for scope in scopes}
    memory = tuple(rng.integers(1, 1000, size).astype(float) for _ in range(count))
    alone = tuple(rng.random(size) for _ in range(count))
    if not has_more:
        return Problem(alone, pairs, memory)
    threes = [(v, v + 1, v + 2) for v in range(0, count - 2, 3)]
    pairs |= {scope: rng.random((size, size, size)) for scope in threes}
    return Problem(alone, pairs, memory, {scope: rng.integers(0, 1000, pairs[scope].shape).astype(float) for scope in pairs})


def cost_of(problem: Problem, choices: tuple[int, ...]) -> float:
    unary = sum(table[i] for table, i in zip(problem.costs, choices, strict=True))
    return float(unary + sum(table[tuple(choices[v] for v in scope)] for scope, table in problem.pairs.items()))


def bytes_of(problem: Problem, choices: tuple[int, ...]) -> float:
    alone = sum(table[i] for table, i in zip(problem.memory_bytes, choices, strict=True))
    return float(alone + sum(table[tuple(choices[v] for v in scope)] for scope, table in problem.pair_bytes.items()))


def brute_force(problem: Problem, budget: float = math.inf) -> float:
    """Least cost within the budget; inf when nothing is allowed."""
    fitting = (
        choices for choices in itertools.product(*(range(len(table)) for table in problem.costs)) if bytes_of(problem, choices) <= budget
    )
    return min((cost_of(problem, choices) for choices in fitting), default=math.inf)


def ilp(problem: Problem, budget: float = math.inf) -> float:
    """The same by HiGHS: one binary per choice, one variable per entry of a table whose margins are those binaries."""
    offsets = np.cumsum([0, *map(len, problem.costs)])
    columns, rows, cost = int(offsets[-1]), [], list(np.concatenate(problem.costs))
    for offset, table in zip(offsets, problem.costs, strict=False):
        rows.append(({int(offset) + i: 1.0 for i in range(len(table))}, 1.0))
    held = list(np.concatenate(problem.memory_bytes)) if problem.memory_bytes else []
    for scope, table in problem.pairs.items():
        at = columns + np.arange(table.size).reshape(table.shape)
        for dim, w in enumerate(scope):
            lines = np.moveaxis(at, dim, 0).reshape(table.shape[dim], -1)
            rows += [({**dict.fromkeys(map(int, line), 1.0), int(offsets[w]) + i: -1.0}, 0.0) for i, line in enumerate(lines)]
        columns, cost = columns + table.size, cost + list(table.ravel())
        held += list(problem.pair_bytes.get(scope, np.zeros(table.shape)).ravel())
    entries = [(r, c, value) for r, (row, _) in enumerate(rows) for c, value in row.items()]
    r, c, values = map(list, zip(*entries, strict=True))
    totals = [total for _, total in rows]
    constraints = [LinearConstraint(sparse.csr_array((values, (r, c)), shape=(len(rows), columns)), totals, totals)]
    if budget < math.inf:
        constraints.append(LinearConstraint(np.array(held)[None], -math.inf, budget))
    upper = np.where(np.isinf(cost), 0.0, 1.0)
    whole = (np.arange(columns) < offsets[-1]).astype(int)
    result = milp(
        np.where(np.isinf(cost), 0.0, cost), constraints=constraints, bounds=(0, upper), integrality=whole, options={"mip_rel_gap": 0}
    )
    assert result.success, result.message
    return float(result.fun)


def assert_consistent(problem: Problem, solution: Solution) -> None:
    assert solution.objective_s == pytest.approx(cost_of(problem, solution.choices), rel=1e-12)
    assert solution.memory_bytes == bytes_of(problem, solution.choices)
    assert solution.bound_s <= solution.objective_s < math.inf
    assert solution.is_exact == (solution.bound_s == solution.objective_s)


@settings(max_examples=150, deadline=None)
@given(problems(), st.booleans())
def test_equals_brute_force(problem: Problem, is_pruned: bool) -> None:
    least = brute_force(problem)
    if least == math.inf:
        with pytest.raises(InfeasibleError):
            solve(problem, is_pruned=is_pruned)
        return
    solution = solve(problem, is_pruned=is_pruned)
    assert_consistent(problem, solution)
    assert solution.is_exact
    assert solution.objective_s == least


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(0, 30), st.booleans())
def test_budget_brackets_brute_force(problem: Problem, budget: int, is_pruned: bool) -> None:
    least = brute_force(problem, budget)
    if least == math.inf:
        with pytest.raises(InfeasibleError):
            solve(problem, budget, is_pruned=is_pruned)
        return
    solution = solve(problem, budget, is_pruned=is_pruned)
    assert_consistent(problem, solution)
    assert solution.memory_bytes <= budget
    assert solution.bound_s <= least + 1e-9
    assert least <= solution.objective_s


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(1, 8), st.none() | st.integers(5, 30))
def test_table_limit_brackets_brute_force(problem: Problem, limit: int, budget: int | None) -> None:
    least = brute_force(problem, math.inf if budget is None else budget)
    if least == math.inf:
        with pytest.raises(InfeasibleError):
            solve(problem, budget, max_table_entries=limit)
        return
    with contextlib.suppress(InfeasibleError):  # the search may miss the few assignments that are allowed
        solution = solve(problem, budget, max_table_entries=limit)
        assert_consistent(problem, solution)
        assert solution.largest_table <= max(limit, *map(len, problem.costs), *(t.size for t in problem.pairs.values()))
        assert solution.bound_s <= least + 1e-9
        assert least <= solution.objective_s


@pytest.mark.parametrize("seed", range(4))
def test_equals_ilp(seed: int) -> None:
    problem = middle_problem(seed, reach=2 + seed % 2)
    solution = solve(problem)
    assert solution.is_exact
    assert solution.objective_s == pytest.approx(ilp(problem), rel=1e-6)
    assert solution.objective_s == pytest.approx(solve(problem, is_pruned=False).objective_s, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.7, 0.3])
@pytest.mark.parametrize("has_more", [False, True])
def test_budget_brackets_ilp(seed: int, share: float, has_more: bool) -> None:
    problem = middle_problem(seed, count=12 if has_more else 20, reach=2, has_more=has_more)
    with pytest.raises(InfeasibleError) as nothing:
        solve(problem, 0)
    budget = nothing.value.least_bytes + share * (solve(problem).memory_bytes - nothing.value.least_bytes)
    solution, least = solve(problem, budget), ilp(problem, budget)
    assert_consistent(problem, solution)
    assert solution.memory_bytes <= budget
    assert solution.bound_s <= least * (1 + 1e-6)
    assert least <= solution.objective_s * (1 + 1e-6)
    assert solution.objective_s - solution.bound_s < 0.1 * least


def test_budget_that_holds_anyway_is_free() -> None:
    problem = middle_problem(0)
    free = solve(problem)
    assert solve(problem, free.memory_bytes).objective_s == free.objective_s


def layered(layers: int) -> Problem:
    """Layers of a residual variable, a short chain beside it, and the skip to the next residual variable."""
    rng = np.random.default_rng(0)
    costs = [rng.random(size) for size in (9, 5, 4)]
    scopes = [(0, 1), (1, 2), (2, 3), (0, 3)]
    sizes = [9, 5, 4, 9]
    tables = [rng.random((sizes[a], sizes[b])) for a, b in scopes]
    pairs = {(3 * k + a, 3 * k + b): t.copy() for k in range(layers) for (a, b), t in zip(scopes, tables, strict=True)}
    return Problem((*(c.copy() for _ in range(layers) for c in costs), costs[0]), pairs)


def test_repeated_layers_are_eliminated_once() -> None:
    few, many = solve(layered(8)), solve(layered(64))
    assert many.is_exact
    assert many.distinct_eliminations <= few.distinct_eliminations + 16 < 64
    assert len(many.choices) == 193
    by_hand = layered(64)
    reached = by_hand.costs[0]
    for k in range(64):  # one layer at a time, by hand: over both inner variables, then over the residual one
        a, b, c, skip = (by_hand.pairs[3 * k + u, 3 * k + v] for u, v in ((0, 1), (1, 2), (2, 3), (0, 3)))
        inner = (a + by_hand.costs[1])[:, :, None] + (b + by_hand.costs[2])[None]
        step = (inner.min(axis=1)[:, :, None] + c[None]).min(axis=1) + skip
        reached = (reached[:, None] + step).min(axis=0) + by_hand.costs[0]
    assert many.objective_s == pytest.approx(reached.min(), rel=1e-12)


def test_blocks_change_nothing_but_the_work() -> None:
    plain = layered(64)
    blocks = tuple((3 * k, 3 * k + 1, 3 * k + 2) for k in range(64))
    solution = solve(replace(plain, blocks=blocks))
    assert solution.objective_s == pytest.approx(solve(plain).objective_s, rel=1e-12)
    assert solution.distinct_eliminations < 32
    memory = tuple(np.arange(len(cost), dtype=float)[::-1].copy() for cost in plain.costs)
    budgeted = replace(plain, memory_bytes=memory)
    budget = 0.8 * solve(budgeted, 1e9).memory_bytes
    alike = [solve(problem, budget) for problem in (budgeted, replace(budgeted, blocks=blocks))]
    assert alike[0].bound_s == pytest.approx(alike[1].bound_s, rel=1e-9)
    assert all(solution.memory_bytes <= budget for solution in alike)
    assert all(solution.objective_s <= solution.bound_s * 1.01 for solution in alike)


def test_repeated_layers_solve_alike_when_pruned_or_not() -> None:
    pruned, plain = solve(layered(16)), solve(layered(16), is_pruned=False)
    assert pruned.objective_s == pytest.approx(plain.objective_s, rel=1e-12)


def test_dominated_choice_is_kept_when_it_saves_memory() -> None:
    problem = Problem((np.array([1.0, 2.0]),), {}, (np.array([10.0, 4.0]),))
    assert solve(problem).choices == (0,)
    solution = solve(problem, 5)
    assert (solution.choices, solution.objective_s, solution.memory_bytes) == ((1,), 2.0, 4.0)


def test_of_equal_choices_the_lowest_wins() -> None:
    problem = Problem((np.zeros(3), np.zeros(2)), {(0, 1): np.zeros((3, 2))})
    assert solve(problem).choices == solve(problem, is_pruned=False).choices == (0, 0)


def test_wide_problem_falls_back_to_a_bound() -> None:
    problem = middle_problem(3, count=40, size=5, reach=4)
    exact, bounded = solve(problem), solve(problem, max_table_entries=20)
    assert exact.is_exact
    assert not bounded.is_exact
    assert bounded.largest_table <= 20
    assert bounded.bound_s < exact.objective_s <= bounded.objective_s < 1.5 * exact.objective_s


@pytest.mark.parametrize("budget", [None, 10_000])
@pytest.mark.parametrize("limit", [2**26, 20])
def test_is_deterministic(budget: float | None, limit: int) -> None:
    problem = middle_problem(7, reach=3)
    reordered = replace(problem, pairs=dict(sorted(problem.pairs.items(), reverse=True)))
    first = solve(problem, budget, max_table_entries=limit)
    assert first == solve(problem, budget, max_table_entries=limit)
    assert first == solve(reordered, budget, max_table_entries=limit)


def test_no_variables() -> None:
    assert solve(Problem((), {})) == Solution((), 0.0, 0.0, 0.0, 1, 0)


@pytest.mark.parametrize("is_pruned", [True, False])
def test_infeasible(is_pruned: bool) -> None:
    unequal = np.array([[math.inf, 0.0], [0.0, math.inf]])
    two = np.zeros(2)
    odd_cycle = Problem((two, two, two), {(0, 1): unequal, (1, 2): unequal, (0, 2): unequal})
    with pytest.raises(InfeasibleError, match=r"^no assignment has a finite cost$"):
        solve(odd_cycle, is_pruned=is_pruned)
    with pytest.raises(InfeasibleError, match=r"infinite|finite"):
        solve(Problem((two, two), {(0, 1): np.full((2, 2), math.inf)}), is_pruned=is_pruned)


def test_infeasible_under_the_budget_says_what_is_reachable() -> None:
    problem = Problem((np.array([1.0, 2.0, math.inf]),) * 2, {}, (np.array([2000.0, 1500.0, 1.0]),) * 2)
    with pytest.raises(AutoshardError, match=r"^budget of 2,500 bytes, least reachable is 3,000 bytes$"):
        solve(problem, 2500)


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (Problem((np.array([math.nan]),), {}), r"costs\[0\] holds nan or -inf"),
        (Problem((np.zeros(0),), {}), r"costs\[0\] has shape \(0,\)"),
        (Problem((np.zeros(2), np.zeros(3)), {(0, 1): np.zeros((3, 2))}), r"pairs\[0, 1\] has shape \(3, 2\), expected \(2, 3\)"),
        (Problem((np.zeros(2), np.zeros(3)), {(1, 0): np.zeros((3, 2))}), r"pair \(1, 0\) is not"),
        (Problem((np.zeros(2),), {}, None, {(0, 1): np.zeros((2, 2))}), r"pair_bytes has scopes that pairs does not: \[\(0, 1\)\]"),
    ],
)
def test_malformed_problem(problem: Problem, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        solve(problem)


def test_budget_without_memory() -> None:
    with pytest.raises(ValueError, match="needs one memory table"):
        solve(Problem((np.zeros(2),), {}), 1.0)
