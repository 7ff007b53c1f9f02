"""Properties of the cost model: whatever a solver could exploit is missing from no term."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import autoshard
from autoshard import Hardware
from autoshard.candidates import CandidateTable
from autoshard.conversion_table import ConversionTable
from autoshard.costs import OPTIMIZERS, CostModel, Optimizer, split_of
from autoshard.errors import InputError
from autoshard.hardware import hardware_of
from autoshard.measured import Measured, op_key
from autoshard.mesh import MeshSpec
from autoshard.ops.row import Call, TensorInfo
from autoshard.placements import I, Layout, P, Placement, R, S, local_shape
from autoshard.rules import rule_of

COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "rotate")
LOCAL = ("slice", "place", "keep_first")
MESHES = ("a=8", "a=2,b=4", "a=8,b=8", "a=3,b=2,c=4", "a=32,b=2")

hardware = st.sampled_from(["a100", "h100", "h100x2", "b200x4", "cpu"]).map(hardware_of)
meshes = st.sampled_from(MESHES).map(MeshSpec.of)
sizes = st.integers(0, 2**33)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


def uniform(**changes: float) -> Hardware:
    rates = {"flops_per_s": 1e12, "memory_bytes_per_s": 1e11, "memory_bytes": 1e10, "link_bytes_per_s": 1e10}
    return Hardware.uniform("uniform", **{**rates, "collective_latency_s": 1e-5, "kernel_latency_s": 1e-6, **changes})


def linear(batch: int, inner: int, outer: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> Call:
    x, weight = TensorInfo((batch, inner), dtype, True), TensorInfo((outer, inner), dtype, True)
    terms = {"bias": TensorInfo((outer,), dtype, True)} if bias else {}
    arguments = {"input": x, "weight": weight, **terms}
    return Call("aten.linear.default", arguments, tuple(arguments.values()), (TensorInfo((batch, outer), dtype, True),))


def pointwise(shape: tuple[int, ...], needs_grad: bool = True) -> Call:
    x = TensorInfo(shape, torch.float32, needs_grad)
    return Call("aten.relu.default", {"self": x}, (x,), (x,))


def times(costs: CostModel, call: Call, factors: tuple[str, ...] | None = None) -> tuple[float, float]:
    """Seconds forward and backward of a call whose factors are split, one per axis; whole by default."""
    rule = rule_of(call.op)
    assert rule is not None
    equation = rule.bind(call)
    factors = factors or ("",) * costs.mesh.ndim
    values = (*call.inputs, *call.outputs)
    layouts = []
    for operand in (*equation.inputs, *equation.outputs):
        dims = [next((k for k, dim in enumerate(operand.dims) if factor in dim), None) if factor else None for factor in factors]
        layouts.append(tuple(R if dim is None else S(dim) for dim in dims))
    return costs.op_times(call.op, rule, equation, values, layouts, split_of(equation, factors, costs.mesh.shape), call)


# ---------------------------------------------------------------------------------------------------------- collectives


@given(hardware, meshes, st.sampled_from(COLLECTIVES + LOCAL), sizes, sizes, st.data())
def test_seconds_grow_with_bytes(hardware: Hardware, mesh: MeshSpec, name: str, one: int, other: int, data: st.DataObject) -> None:
    costs, axis = CostModel(mesh, hardware), data.draw(st.integers(0, mesh.ndim - 1))
    fewer, more = sorted((one, other))
    assert costs.collective_s(name, axis, fewer) <= costs.collective_s(name, axis, more)
    assert (costs.collective_s(name, axis, fewer) < costs.collective_s(name, axis, more)) == (fewer < more) or more < 2 * fewer


@given(hardware, meshes, sizes, st.data())
def test_reduce_scatter_and_all_gather_are_an_all_reduce(hardware: Hardware, mesh: MeshSpec, size: int, data: st.DataObject) -> None:
    """Two collectives cost what the one of both costs, and one start more, at every size and by every algorithm."""
    costs, axis = CostModel(mesh, hardware), data.draw(st.integers(0, mesh.ndim - 1))
    start = hardware.collective_latency_s if size else 0.0
    parts = costs.collective_s("reduce_scatter", axis, size) + costs.collective_s("all_gather", axis, size)
    assert parts - start == pytest.approx(costs.collective_s("all_reduce", axis, size))
    for a, b, both in zip(*(costs.collective_terms(name, axis) for name in ("reduce_scatter", "all_gather", "all_reduce")), strict=True):
        assert (a[0] + b[0] - hardware.collective_latency_s, a[1] + b[1]) == pytest.approx(both)


@given(hardware, meshes, st.sampled_from(COLLECTIVES), st.integers(1, 2**33), st.data())
def test_no_collective_is_cheaper_than_its_start_or_its_wire(
    hardware: Hardware, mesh: MeshSpec, name: str, size: int, data: st.DataObject
) -> None:
    costs, axis = CostModel(mesh, hardware), data.draw(st.integers(0, mesh.ndim - 1))
    n, fastest = mesh.shape[axis], max(link.bytes_per_s for link in hardware.links)
    sent = {"all_reduce": 2 * (n - 1) / n, "all_to_all": (n - 1) / n / n, "rotate": 1 / n}.get(name, (n - 1) / n) * size
    assert costs.collective_s(name, axis, size) >= hardware.collective_latency_s + sent / (fastest * n)


@pytest.mark.parametrize("preset", ["h100", "cpu"])
def test_nothing_costs_nothing(preset: str) -> None:
    costs = CostModel(MeshSpec.of("a=1,b=4"), hardware_of(preset))
    assert {costs.collective_s(name, 0, 1e6) for name in COLLECTIVES} == {0.0}  # an axis of one rank
    assert {costs.collective_s("identity", axis, 1e6) for axis in (0, 1)} == {0.0}
    empty, full = (TensorInfo((0, 4), torch.float32, True), TensorInfo((8, 4), torch.float32, True))
    layouts: list[Layout] = [(I, x) for x in (R, I, P, S(0), S(1))]
    for src, dst in itertools.product(layouts, layouts):
        found = costs.best_route(src, dst, empty)
        assert found is not None
        assert found[0] == 0.0
        found = costs.best_route(src, dst, full)
        assert found is not None
        assert (found[0] == 0.0) == (src == dst)
    assert not ConversionTable(costs).seconds(layouts, layouts, empty).any()
    assert times(costs, pointwise((0, 4))) == (0.0, 0.0)
    assert times(costs, linear(0, 0, 4)) > (0.0, 0.0)  # its weight's gradient is zeros, which somebody writes


def test_conversions_that_need_no_gradient_cost_forward_alone() -> None:
    costs = CostModel(MeshSpec.of("a=4"), hardware_of("h100"))
    with_gradient, without = (TensorInfo((64, 64), torch.float32, needs) for needs in (True, False))
    both, once = costs.best_route((S(0),), (R,), with_gradient), costs.best_route((S(0),), (R,), without)
    assert both is not None
    assert once is not None
    assert once[0] == costs.collective_s("all_gather", 0, without.nbytes)
    assert both[0] == pytest.approx(once[0] + costs.collective_s("reduce_scatter", 0, without.nbytes))


@pytest.mark.parametrize("size", [1, 64, 4096])
def test_the_table_of_conversions_takes_the_best_algorithm_as_single_routes_do(size: int) -> None:
    """On axes over many nodes, where small values go by trees and large ones by rings."""
    mesh, info = MeshSpec.of("a=16,b=2"), TensorInfo((32 * size, 64), torch.float32, True)
    costs = CostModel(mesh, hardware_of("h100x2"))
    assert len(costs.collective_terms("all_reduce", 0)) == 2
    kinds: tuple[Placement, ...] = (I, R, P, S(0), S(1))
    layouts: list[Layout] = [(a, b) for a in kinds for b in kinds if local_shape(info.shape, (a, b), mesh.shape)]
    table = ConversionTable(costs).seconds(layouts, layouts, info)
    for i, src in enumerate(layouts):
        for j, dst in enumerate(layouts):
            route = costs.best_route(src, dst, info)
            assert route is not None
            assert table[i, j] == pytest.approx(route[0], rel=1e-9)


def test_trees_serve_small_values_and_rings_large_ones() -> None:
    costs = CostModel(MeshSpec.of("a=64,b=8"), hardware_of("h100"))
    ring, tree = costs.collective_terms("all_reduce", 0)
    assert tree[0] < ring[0] / 5
    assert costs.collective_s("all_reduce", 0, 1e3) == pytest.approx(tree[0] + tree[1] * 1e3)
    assert costs.collective_s("all_reduce", 0, 1e9) == pytest.approx(ring[0] + ring[1] * 1e9)


# ---------------------------------------------------------------------------------------------------------- permutations


@given(st.permutations([0, 1, 2]), st.integers(1, 3), st.sampled_from([R, I, P, S(0), S(1), S(2)]), st.sampled_from([R, I, P, S(0), S(1)]))
def test_permuting_dims_changes_nothing(order: list[int], scale: int, a: Placement, b: Placement) -> None:
    costs = CostModel(MeshSpec.of("a=4,b=2"), hardware_of("h100x2"))

    def permuted(layout: Layout) -> Layout:
        return tuple(S(order.index(p.dim)) if p.is_split else p for p in layout)

    shape = (8 * scale, 16, 24)
    value = TensorInfo(shape, torch.float32, True)
    moved = TensorInfo(tuple(shape[dim] for dim in order), torch.float32, True)
    src, dst = (a, b), (b, I)
    assert costs.local_bytes(value, src) == costs.local_bytes(moved, permuted(src))
    here, there = costs.best_route(src, dst, value), costs.best_route(permuted(src), permuted(dst), moved)
    assert (here is None) == (there is None)
    assert here is None or there is None or here[0] == pytest.approx(there[0])


@given(st.permutations([0, 1, 2]), st.lists(st.sampled_from([R, I, P, S(0), S(1)]), min_size=6, max_size=6))
def test_permuting_axes_of_equal_speed_changes_nothing(order: list[int], kinds: list[Placement]) -> None:
    shape = (2, 3, 4)
    here, there = (
        CostModel(MeshSpec(tuple(f"a{k}" for k in axes), tuple(shape[k] for k in axes)), uniform()) for axes in (range(3), order)
    )
    value = TensorInfo((48, 48), torch.float32, True)
    src, dst = tuple(kinds[:3]), tuple(kinds[3:])
    dims = [[p.dim for p in layout if p.is_split] for layout in (src, dst)]
    assume(all(len(set(split)) == len(split) for split in dims) and not set(dims[0]) & set(dims[1]))  # pieces that nest have an order
    found = here.best_route(src, dst, value), there.best_route(tuple(src[k] for k in order), tuple(dst[k] for k in order), value)
    assert found[0] is not None
    assert found[1] is not None
    assert found[0][0] == pytest.approx(found[1][0])
    assert here.local_bytes(value, src) == pytest.approx(there.local_bytes(value, tuple(src[k] for k in order)))


# ------------------------------------------------------------------------------------------------------------------- ops


@given(hardware, dtypes, st.integers(1, 64), st.integers(1, 64), st.integers(1, 64), st.integers(1, 4), st.integers(0, 2))
def test_ops_cost_more_with_more_bytes(
    hardware: Hardware, dtype: torch.dtype, batch: int, inner: int, outer: int, more: int, dim: int
) -> None:
    costs = CostModel(MeshSpec.of("a=1"), hardware)
    shape = [batch * 32, inner * 32, outer * 32]
    small = times(costs, linear(*shape, dtype=dtype))
    shape[dim] *= more
    large = times(costs, linear(*shape, dtype=dtype))
    assert small[0] <= large[0]
    assert small[1] <= large[1]
    latency = hardware.device.kernel_latency_s
    assert min(small) >= latency
    assert times(costs, pointwise((batch,))) <= times(costs, pointwise((batch * more,)))


@given(
    hardware, dtypes, st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([1, 2, 3]), st.integers(1, 40), st.sampled_from(["b.0", "i", "o"])
)
def test_more_ranks_never_mean_more_work(hardware: Hardware, dtype: torch.dtype, n: int, more: int, size: int, factor: str) -> None:
    """Compute and bytes of one rank, sizes that do not divide included."""
    call = linear(size * 8, size * 8, size * 8, dtype, bias=False)
    rule = rule_of(call.op)
    assert rule is not None
    factor = factor if factor in rule.bind(call).factors else rule.bind(call).factors[0]
    few, many = (CostModel(MeshSpec.of(f"a={ranks}"), hardware) for ranks in (n, n * more))
    for before, after in zip(times(few, call, (factor,)), times(many, call, (factor,)), strict=True):
        assert after <= before * (1 + 1e-9)
    value = call.inputs[0]
    assert many.local_bytes(value, (S(0),)) <= few.local_bytes(value, (S(0),)) * (1 + 1e-9)
    assert many.parameter_s(value, (S(0),)) <= few.parameter_s(value, (S(0),)) * (1 + 1e-9)


def test_every_candidate_of_a_model_is_priced_soundly() -> None:
    """No real kernel below its launch, backward at least zero, and op_s the sum of both: attention, norms, losses, views."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(16, 48), nn.LayerNorm(16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            q, k, v = self.up(self.norm(x)).view(4, 8, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(4, 8, 16)
            return F.cross_entropy(self.down(y).flatten(0, 1), labels.flatten())

    plan = autoshard.plan(Model(), "a=2,b=2", (torch.zeros(4, 8, 16), torch.zeros(4, 8, dtype=torch.long)), hardware="h100")
    costs, seen = CostModel(plan.mesh, hardware_of("h100")), 0
    table, price = CandidateTable(plan.program, costs), CostModel.op_times
    latency = hardware_of("h100").device.kernel_latency_s

    def checked(self: CostModel, *args: object, **kwargs: object) -> tuple[float, float]:
        nonlocal seen
        forward, backward = price(self, *args, **kwargs)  # type: ignore[arg-type]
        seen += forward > 0
        assert forward == 0.0 or forward >= latency
        assert backward == 0.0 or backward >= latency
        return forward, backward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CostModel, "op_times", checked)
        for node in plan.program.nodes("op"):
            assert table.of_op(node)
    assert seen > 100


def test_dtypes_have_their_own_speed() -> None:
    costs = CostModel(MeshSpec.of("a=1"), hardware_of("h100"))
    half, single, double = (times(costs, linear(4096, 4096, 4096, dtype))[0] for dtype in (torch.bfloat16, torch.float32, torch.float64))
    assert half < single == double
    assert single == pytest.approx(2 * 4096**3 / (67e12 * 0.6) + 4e-6)
    assert half == pytest.approx(2 * 4096**3 / (989.4e12 * 0.6) + 4e-6)


def test_the_gradient_of_a_bias_is_a_sum() -> None:
    costs = CostModel(MeshSpec.of("a=1"), uniform())
    with_bias, without = (times(costs, linear(512, 512, 512, bias=bias)) for bias in (True, False))
    assert without[1] == pytest.approx(2 * without[0])
    assert with_bias[1] - 2 * with_bias[0] == pytest.approx(4 * (512 * 512 + 512) / 1e11 + 1e-6)


def test_attention_costs_two_and_a_half_times_as_much_backward() -> None:
    costs = CostModel(MeshSpec.of("a=1"), uniform())
    q = TensorInfo((1, 8, 2048, 64), torch.float32, True)
    call = Call("aten.scaled_dot_product_attention.default", {"query": q, "key": q, "value": q}, (q, q, q), (q,))
    forward, backward = times(costs, call)
    assert forward == pytest.approx(4 * 8 * 2048 * 2048 * 64 / 1e12 + 1e-6)
    assert backward == 2.5 * forward


def test_times_that_were_measured_replace_the_roofline() -> None:
    call = linear(8, 16, 32)
    key = op_key(call, [(4, 16), (32, 16), (32,)])
    assert key == "aten.linear.default(float32[4, 16]*, float32[32, 16]*, float32[32]*)"
    known = dataclasses.replace(uniform(), measured=Measured(ops={key: (1.0, 3.0)}))
    costs = CostModel(MeshSpec.of("a=2"), known)
    batch = rule_of(call.op).bind(call).inputs[0].dims[0][0]  # type: ignore[union-attr]
    assert times(costs, call, (batch,)) == (1.0, 3.0)
    assert times(costs, call) != (1.0, 3.0)  # other local shapes
    model = nn.Linear(16, 32)
    prices = [autoshard.plan(model, "a=2", (torch.zeros(8, 16),), hardware=h).stats["objective_s"] for h in (uniform(), known)]
    assert math.isfinite(prices[0])
    whole = op_key(linear(8, 16, 32), [(8, 16), (32, 16), (32,)]).replace("float32[8, 16]*", "float32[8, 16]")
    dear = dataclasses.replace(uniform(), measured=Measured(ops={whole: (100.0, 100.0)}))
    assert autoshard.plan(nn.Linear(16, 32), "a=1", (torch.zeros(8, 16),), hardware=dear).stats["objective_s"] > 200.0


# ------------------------------------------------------------------------------------------------------------ optimizers


def test_optimizers_differ_in_passes_and_states() -> None:
    costs = CostModel(MeshSpec.of("a=2"), uniform())
    value = TensorInfo((64, 32), torch.float32, True)
    assert costs.parameter_s(value, (I,)) == costs.parameter_s(value, (I,), "adamw") == 7 * value.nbytes / 1e11
    assert costs.parameter_s(value, (S(0),), "sgd") == 3 * value.nbytes / 2 / 1e11
    states = {name: costs.state_bytes(value, (S(0),), name) for name in OPTIMIZERS}  # type: ignore[arg-type]
    assert states == {"adamw": 8192, "adam": 8192, "sgd": 0, "sgd_momentum": 4096, "adafactor": 4 * (32 + 32)}
    frozen = dataclasses.replace(value, needs_grad=False)
    assert costs.parameter_s(frozen, (I,)) == costs.state_bytes(frozen, (I,)) == 0.0
    with pytest.raises(InputError, match="no optimizer 'lion' is known to the cost model; there are adamw, adam, sgd"):
        costs.parameter_s(value, (I,), "lion")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "sgd_momentum", "adafactor"])
def test_states_are_those_that_torch_keeps(name: Optimizer) -> None:
    """Numbers kept per parameter, single step counters aside."""
    weight = nn.Parameter(torch.zeros(6, 10))
    makers = {
        "adamw": torch.optim.AdamW,
        "adam": torch.optim.Adam,
        "sgd": torch.optim.SGD,
        "sgd_momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        "adafactor": torch.optim.Adafactor,
    }
    optimizer = makers[name]([weight])  # type: ignore[operator]
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = sum(x.numel() for x in optimizer.state[weight].values() if isinstance(x, torch.Tensor) and x.numel() > 1)
    costs = CostModel(MeshSpec.of("a=1"), uniform())
    assert costs.state_bytes(TensorInfo((6, 10), torch.float32, True), (I,), name) == 4 * kept
