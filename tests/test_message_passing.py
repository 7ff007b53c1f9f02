"""Message passing against brute force: a bound that holds, an assignment, and no choice dropped that is needed."""

import itertools
import math
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoshard import solver_descent
from autoshard.message_passing import pass_messages
from autoshard.solver_tables import InfeasibleError, Model, Problem, load, prune


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Up to five variables, tables of two and of three of them, some combinations forbidden; without choices that go with nothing."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = rng.integers(1, 4, draw(st.integers(1, 5)))
    scopes = [s for n in (2, 3) for s in itertools.combinations(range(len(sizes)), n) if rng.random() < 0.5]
    forbidden = draw(st.sampled_from([0.0, 0.2]))

    def table(*shape: int) -> np.ndarray:
        return np.where(rng.random(shape) < forbidden, math.inf, rng.integers(-3, 9, shape).astype(float))

    costs = tuple(rng.integers(-3, 9, n).astype(float) for n in sizes)
    model = load(Problem(costs, {scope: table(*sizes[list(scope)]) for scope in scopes}), has_budget=False)
    try:
        return prune(model)
    except InfeasibleError:
        return load(Problem(costs, {}), has_budget=False)


def every_total(model: Model) -> dict[tuple[int, ...], float]:
    return {x: model.total(x) for x in itertools.product(*(range(len(domain)) for domain in model.domains))}


@given(models())
@settings(deadline=None)
def test_the_bound_holds_and_no_optimal_choice_is_dropped(model: Model) -> None:
    totals, passed = every_total(model), pass_messages(model)
    least = min(totals.values())
    assert passed.bound <= least + 1e-9
    assert passed.value == totals[passed.choices] or math.isinf(passed.value)
    assert passed.value >= least
    for best in (x for x, total in totals.items() if total == least and total < math.inf):
        assert all(choice in kept for choice, kept in zip(best, passed.kept, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_on_a_tree_it_is_exact(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 6, 30)
    pairs = {(int(rng.integers(0, v)), v): np.empty(0) for v in range(1, 30)}
    pairs = {(u, v): rng.random((sizes[u], sizes[v])) for u, v in pairs}
    model = load(Problem(tuple(rng.random(n) for n in sizes), pairs), has_budget=False)
    passed = pass_messages(model)
    assert passed.value == pytest.approx(passed.bound, rel=1e-12)


def test_a_frustrated_cycle_leaves_a_gap_and_every_choice() -> None:
    """Three variables that all want to differ, of two choices each: the linear relaxation pays nothing, an assignment pays 1."""
    table = np.array([[1.0, 0.0], [0.0, 1.0]])
    model = load(Problem((np.zeros(2),) * 3, {(0, 1): table, (1, 2): table, (0, 2): table}), has_budget=False)
    passed = pass_messages(model)
    assert (passed.value, passed.bound) == (1.0, 0.0)
    assert all(len(kept) == 2 for kept in passed.kept)


@given(models(), st.sampled_from([2.0, math.inf]))
@settings(deadline=None)
def test_where_elimination_is_too_much_work_the_optimum_is_the_same(model: Model, limit: float) -> None:
    """limit: 2.0 makes mini-buckets of what messages leave open: then the bound says less, but never too much."""
    least = min(every_total(model).values())
    with mock.patch.object(solver_descent, "_LITTLE_WORK", -1):
        try:
            found = solver_descent.minimise(model, limit)
        except InfeasibleError:
            assert math.isinf(least) or math.isfinite(limit)
            return
    assert found.objective_s == model.total(found.choices)
    assert found.bound_s <= least + 1e-9
    assert found.objective_s == least or (math.isfinite(limit) and found.objective_s > least)
