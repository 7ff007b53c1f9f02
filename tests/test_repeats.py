"""Models of equal layers, solved on few of them: what is claimed is the optimum, at any depth, and nothing is claimed without proof."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoshard import solver_descent
from autoshard.message_passing import pass_messages
from autoshard.repeats import shorten, solve_repeats
from autoshard.solver import solve
from autoshard.solver_tables import Problem, load, reaches


def stacked(seed: int, layers: int, period: int = 1, most: int = 6, skips: bool = True) -> Problem:
    """Layers of three variables on a chain of residual ones; every `period`-th has equal costs, first and last cost something of their own.

    Layer k: variables 3k (residual), 3k + 1, 3k + 2; a table over two and, in the first layer of a period, one over three.
    """
    rng = np.random.default_rng(seed)
    sizes = [int(n) for n in rng.integers(2, most, 3)]
    inside = [(0, 1), (1, 2), (2, 3), *([(0, 3)] if skips else [])]
    size_of = [*sizes, sizes[0]]
    tables = [{scope: rng.random([size_of[v] for v in scope]) for scope in inside} for _ in range(period)]
    tables[0][0, 1, 2] = rng.random(sizes)
    costs = [[rng.random(n) for n in sizes] for _ in range(period)]
    pairs = {tuple(3 * k + v for v in scope): table for k in range(layers) for scope, table in tables[k % period].items()}
    given_costs = [cost for k in range(layers) for cost in costs[k % period]] + [rng.random(sizes[0])]
    given_costs[0] = rng.random(sizes[0])
    return Problem(tuple(given_costs), pairs, blocks=tuple((3 * k, 3 * k + 1, 3 * k + 2) for k in range(layers)))


@given(st.integers(0, 10**6), st.integers(3, 14), st.sampled_from([1, 1, 2, 3]))
@settings(deadline=None, max_examples=60)
def test_what_is_claimed_is_the_optimum(seed: int, layers: int, period: int) -> None:
    problem = stacked(seed, layers, period)
    best, found = solve(problem).objective_s, solve_repeats(load(problem, has_budget=False))
    if found is not None:
        assert found.value == pytest.approx(best, rel=1e-12)
        assert reaches(found.bound, found.value)
        assert load(problem, has_budget=False).total(found.choices) == found.value


def test_it_is_claimed_for_many() -> None:
    """Not where the linear relaxation leaves a gap, or layers choose in turn."""
    found = [solve_repeats(load(stacked(seed, 12, most=4, skips=False), has_budget=False)) for seed in range(20)]
    assert sum(passed is not None for passed in found) >= 10


@pytest.mark.parametrize("period", [1, 2, 3])
def test_the_short_model_does_not_grow(period: int) -> None:
    few, many = (shorten(load(stacked(3, period * layers, period), has_budget=False)) for layers in (8, 64))
    assert few is not None
    assert many is not None
    assert len(few.model.domains) == len(many.model.domains) <= 3 * period * 5 + 1
    model = load(stacked(3, period * 64, period), has_budget=False)
    for scope, table in model.costs.items():  # every table is one of the short model
        assert np.array_equal(model.pool[table], many.model.pool[many.model.costs[many.scopes[scope]]])
        assert len(set(many.scopes[scope])) == len(scope)
    assert {many.variables[v] for v in range(len(model.domains))} == set(range(len(many.model.domains)))


def test_nothing_repeats() -> None:
    problem = stacked(5, 2)
    assert shorten(load(problem, has_budget=False)) is None
    assert shorten(load(replace(stacked(5, 12), blocks=()), has_budget=False)) is None


def test_blocks_that_skip_a_neighbour_are_left_whole() -> None:
    problem = stacked(5, 12)
    far = {(3 * k + 1, 3 * k + 10): np.ones((len(problem.costs[1]),) * 2) for k in range(9)}
    assert shorten(load(replace(problem, pairs={**problem.pairs, **far}), has_budget=False)) is None


def test_where_equal_layers_choose_in_turn_nothing_is_wrong() -> None:
    """Neighbours that must differ: the optimum alternates, one layer cannot stand for all; the solver finds it all the same."""
    differ = np.array([[5.0, 0.0], [0.0, 5.0]])
    costs = tuple(np.array([0.0, 0.1]) for _ in range(12))
    problem = Problem(costs, {(k, k + 1): differ for k in range(11)}, blocks=tuple((k,) for k in range(12)))
    found = solve_repeats(load(problem, has_budget=False))
    assert found is None or found.value == pytest.approx(0.6)
    with mock.patch.object(solver_descent, "_LITTLE_WORK", 0):
        assert solve(problem).objective_s == pytest.approx(0.6)


@pytest.mark.parametrize("seed", range(10))
def test_the_solver_finds_the_same_with_and_without(seed: int) -> None:
    problem = stacked(seed, 20)
    with mock.patch.object(solver_descent, "_LITTLE_WORK", 0):
        here = solve(problem)
        with mock.patch.object(solver_descent, "solve_repeats", return_value=None):
            there = solve(problem)
    assert here.objective_s == pytest.approx(there.objective_s, rel=1e-12)
    assert here.objective_s == pytest.approx(solve(problem).objective_s, rel=1e-12)
    assert here.is_exact


def test_what_tables_handed_out_gives_the_bound() -> None:
    """The numbers that message passing ends with, put together anew."""
    model = load(stacked(1, 5), has_budget=False)
    passed = pass_messages(model)
    beliefs = [model.pool[model.costs[v,]].copy() for v in range(len(model.domains))]
    rests = 0.0
    for scope, numbers in passed.handed.items():
        rest = model.pool[model.costs[scope]]
        for k, (v, handed) in enumerate(zip(scope, numbers, strict=True)):
            beliefs[v] += handed
            rest = rest - handed.reshape([-1 if k == dim else 1 for dim in range(rest.ndim)])
        rests += rest.min()
    assert rests + sum(belief.min() for belief in beliefs) == pytest.approx(passed.bound, rel=1e-9)
