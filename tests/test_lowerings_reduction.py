"""Lowerings of reductions: what they send, the first of equal numbers, what is no number, half types, autocast."""

import math
from collections import Counter

import pytest
import torch
from precision import check_precision
from test_lowerings import MESH, ints, run, x
from uses import USES

from autoshard import runtime
from autoshard.candidates import lowered_axes
from autoshard.ops import RULES, loss, normalization, reduction
from autoshard.placements import I, P, S
from autoshard.program import call_of
from autoshard.runtime import Axis
from autoshard.testing import OpCase, check_rule
from autoshard.traffic import meter

aten = torch.ops.aten

LOWERED = sorted(name for name, rule in RULES.items() if rule.lowering is not None and name.startswith("aten."))


def overload(name: str) -> torch._ops.OpOverload:
    _, base, variant = name.split(".")
    return getattr(getattr(aten, base), variant)


@pytest.mark.parametrize("name", [name for name in LOWERED if name.split(".")[1] not in ("embedding",)])
def test_priced_as_sent(name: str, wire: list) -> None:
    """What a lowering is priced for, forward and backward, is what it sends on simulated ranks."""
    row, rule = USES[name][0], RULES[name]
    case = OpCase(overload(name), row.args, row.kwargs, MESH)
    assert rule.lowering is not None
    for candidate in case.candidates({}):
        axes = lowered_axes(rule, [strategy.factor for strategy in candidate.strategies], MESH.axes)
        if axes:
            _, node = case.program()
            priced = meter(rule.lowering.function, call_of(node), candidate.inputs, axes, MESH)
            wire.clear()
            case.run(candidate)
            sent = Counter("all_reduce" if kind == "maximum" else kind for kind, _ in wire)
            assert Counter(kind for _, kind, _ in priced if kind != "identity") == sent


# An op on 8 x 16 numbers, the second dim split on both axes: what crosses each axis, forward and backward.
SENT = {
    "softmax": (aten.softmax.int, (-1,), {("maximum", 8): 2, ("all_reduce", 8): 4}),
    "log_softmax": (aten.log_softmax.int, (-1,), {("maximum", 8): 2, ("all_reduce", 8): 4}),
    "logsumexp": (aten.logsumexp.default, ([-1],), {("maximum", 8): 2, ("all_reduce", 8): 2}),
    "amax": (aten.amax.default, ([-1],), {("maximum", 8): 2, ("all_reduce", 8): 4}),
    "var_mean": (aten.var_mean.correction, ([-1],), {("all_reduce", 8): 6}),
    "vector_norm": (aten.linalg_vector_norm.default, (2, [-1]), {("all_gather", 8): 2, ("slice", 16): 2}),
    "prod": (aten.prod.dim_int, (-1,), {("all_gather", 8): 2, ("slice", 16): 2}),
    "cumsum": (aten.cumsum.default, (-1,), {("all_gather", 8): 2, ("reduce_scatter", 16): 2}),
    "mean": (aten.mean.dim, ([-1],), {}),
    "argmax": (aten.argmax.default, (-1,), {("all_gather", 8): 4}),
    "max": (aten.max.dim, (-1,), {("all_gather", 8): 4, ("slice", 16): 2}),
    "topk": (aten.topk.default, (3, -1), {("all_gather", 24): 4, ("slice", 48): 2}),
    "kthvalue": (aten.kthvalue.default, (5, -1), {("all_gather", 32): 2, ("slice", 64): 1, ("all_gather", 40): 2, ("slice", 80): 1}),
}


@pytest.mark.parametrize(("op", "args", "sent"), SENT.values(), ids=SENT)
def test_statistics_alone_cross_the_axes(op: torch._ops.OpOverload, args: tuple, sent: dict, wire: list) -> None:
    numbers = torch.nn.Buffer(x(8, 16)) if op is aten.argmax.default else x(8, 16)
    run(OpCase(op, (numbers, *args), {}, MESH), "d1", "d1")
    assert Counter(wire) == sent


@pytest.mark.parametrize("factors", [("d1", "d1"), ("d1", "k0"), ("k0", "d1")])
@pytest.mark.parametrize("op", [aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default])
def test_first_of_equal_numbers(op: torch._ops.OpOverload, factors: tuple[str, str]) -> None:
    """Equal numbers on one rank, on several, on all."""
    rows = torch.stack([torch.arange(16) // 4 % 2, torch.arange(16) % 3, torch.zeros(16), torch.arange(16) == 15]).double()
    rows = torch.nn.Buffer(rows) if op in (aten.argmax.default, aten.argmin.default) else rows
    run(OpCase(op, (rows, 1), {}, MESH), *factors)


def test_place_among_all_numbers() -> None:
    run(OpCase(aten.argmax.default, (ints(3, 8, 3),), {}, MESH), "d0", "d0")
    assert {strategy.factor for (strategy,) in check_rule(aten.argmax.default, x(4, 6))} == {"", "d0"}


@pytest.mark.parametrize("op", [aten.topk.default, aten.kthvalue.default])
def test_choice_among_equal_numbers(op: torch._ops.OpOverload) -> None:
    """Which of them is chosen is open; that it is one of them, the same on all ranks, is not."""
    case = OpCase(op, (torch.nn.Buffer(ints(3, 4, 16).double()), 5), {}, MESH)
    found = case.run(next(c for c in case.candidates({}) if [s.factor for s in c.strategies] == ["d1", "d1"]))
    whole = case.operands[0]
    for values, places in zip(*found.outputs, strict=True):
        assert torch.equal(values, case.outputs[0])
        assert torch.equal(whole.gather(1, places.view(4, -1)), values.view(4, -1))
        assert torch.equal(places, found.outputs[1][0])
        assert all(len(row.unique()) == len(row) for row in places.view(4, -1))


@pytest.mark.parametrize("place", [0, 5, 15])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name", ["softmax.int", "log_softmax.int", "logsumexp", "max.dim", "min.dim", "argmax", "cumsum", "prod.dim_int", "topk", "kthvalue"]
)
def test_what_is_no_number(name: str, value: float, place: int) -> None:
    rows = x(2, 16)
    rows[0, place] = value
    base, _, variant = name.partition(".")
    op = getattr(getattr(aten, base), variant or "default")
    case = OpCase(op, (torch.nn.Buffer(rows), [1] if name == "logsumexp" else 1), {}, MESH)
    run(case, "d1", "d1")


@pytest.mark.parametrize("name", ["amax", "amin"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_extreme_of_what_is_no_number(name: str, value: float) -> None:
    rows = torch.nn.Buffer(x(2, 16))
    rows[0, 5] = value
    run(OpCase(getattr(aten, name).default, (rows, [1]), {}, MESH), "d1", "d1")


def test_gradient_of_extremes_is_shared_by_all_equal_numbers() -> None:
    rows = torch.tensor([[3.0, 3, 1, 0, 3, 0, 0, 0]], dtype=torch.float64)
    found, _ = run(OpCase(aten.amax.default, (rows, [1]), {}, MESH), "d1", "d1")
    shares = torch.cat([piece.grad for piece in found.operands[0]], 1)
    assert ((shares != 0) == (rows == 3)).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("name", ["amax", "amin"])
def test_extremes_of_integers(name: str, dtype: torch.dtype) -> None:
    """The smallest integer of a type has no negative."""
    low = 0 if dtype in (torch.uint8, torch.bool) else torch.iinfo(dtype).min
    rows = ints(5, 4, 8).to(dtype)
    rows[0, 3] = low
    run(OpCase(getattr(aten, name).default, (rows, [1]), {}, MESH), "d1", "d1")


@pytest.mark.parametrize("op", [aten.softmax.int, aten.cumsum.default, aten.max.dim])
def test_dims_without_numbers(op: torch._ops.OpOverload) -> None:
    """No rank shares a dim of length 0; the op runs whole."""
    proved = check_rule(op, torch.zeros(0, 6, dtype=torch.float64), 1, mesh=MESH)
    assert all(strategy.factor in ("", "d1") for joint in proved for strategy in joint)


def test_not_offered() -> None:
    """Strategies that would not compute what the op computes."""

    def splits(op: torch._ops.OpOverload, *args: object, **kwargs: object) -> set[str]:
        return {strategy.factor for (strategy,) in check_rule(op, *args, **kwargs)} - {""}

    assert splits(aten.topk.default, ints(9, 4, 6), 2) == {"k0"}
    assert splits(aten.var.correction, torch.randn(4, 6, dtype=torch.complex64), [1]) == {"k0"}
    assert splits(aten.linalg_vector_norm.default, x(4, 6), -2, [1]) == {"k0"}
    assert splits(aten.all.dims, x(4, 6) > 0, []) == set()
    assert not any(strategy.inputs[0] == P for (strategy,) in check_rule(aten.cumsum.default, torch.nn.Buffer(x(4)), 0, dtype=torch.int64))
    for op in (aten.cumsum.default, aten.argmax.default):
        proved = check_rule(op, x(12), 0, segmentations={12: [(4, 8)]})
        assert not any(p.segments for (strategy,) in proved for p in strategy.inputs)


PRECISE = {
    "softmax": (aten.softmax.int, (4 * x(16, 256), 1)),
    "log_softmax": (aten.log_softmax.int, (4 * x(16, 256), 1)),
    "logsumexp": (aten.logsumexp.default, (4 * x(16, 256), [1])),
    "mean": (aten.mean.dim, (3 + x(16, 256), [1])),
    "var_mean": (aten.var_mean.correction, (3 + x(16, 256), [1])),
    "std": (aten.std.correction, (3 + x(16, 256), [1])),
    "cumsum": (aten.cumsum.default, (x(16, 256), 1)),
    "vector_norm": (aten.linalg_vector_norm.default, (x(16, 256), 2, [1])),
    "prod": (aten.prod.dim_int, (1 + x(16, 64) / 10, 1)),
    "amax": (aten.amax.default, (x(16, 256), [1])),
    "cosine_similarity": (aten.cosine_similarity.default, (x(16, 256), x(16, 256, seed=1), 1)),
    "pairwise_distance": (aten.pairwise_distance.default, (x(16, 256), x(16, 256, seed=1))),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("op", "args"), PRECISE.values(), ids=PRECISE)
def test_half_types(op: torch._ops.OpOverload, args: tuple, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(check_precision(monkeypatch, op, dtype, *args)) == 2


@pytest.mark.parametrize(("op", "dim"), [(aten.softmax.int, 1), (aten.prod.dim_int, 1), (aten.cumsum.default, 1)])
def test_autocast_changes_what_it_changes_of_the_op(op: torch._ops.OpOverload, dim: int) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        case = OpCase(op, (x(4, 8).bfloat16(), dim), {}, MESH)
        candidate = next(c for c in case.candidates({}) if [s.factor for s in c.strategies] == ["d1", "d1"])
        assert case.run(candidate).outputs[0][0].dtype == case.outputs[0].dtype


def test_layouts_of_results() -> None:
    case = OpCase(aten.max.dim, (x(8, 12), 1), {}, MESH)
    assert run(case, "d1", "d1")[1] == (I, I)
    assert run(case, "k0", "d1")[1] == (S(0), I)
    assert run(OpCase(aten.histc.default, (torch.nn.Buffer(x(8)), 4, -1, 1), {}, MESH), "d0", "d0")[1] == (P, P)


MINE = [name for family in (loss, normalization, reduction) for name, rule in family.ROWS.items() if rule.lowering is not None]


@pytest.mark.parametrize("name", sorted({RULES[name].lowering.function: name for name in MINE}.values()))  # type: ignore[union-attr]
def test_traced_by_the_compiler_as_one_graph(name: str) -> None:
    """On an axis of one rank, where nothing is sent."""
    lowering = RULES[name].lowering
    assert lowering is not None
    function, row = getattr(runtime, lowering.function), USES[name][0]
    axes = {key: (Axis("a", 1, 0, ""),) for key in lowering.axes.values()}
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: function(*args, **axes, **row.kwargs), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*row.args), overload(name)(*row.args, **row.kwargs), equal_nan=True)
