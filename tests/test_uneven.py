"""Dims that do not divide are split exactly: conversions, ops, whole models, random models under random plans, real processes.

Rows of the op table are proved on the uses of tests/uses with other lengths (7, 15, 23 and so on on two and four ranks), padding included:
copies of the last slice in values, zeros in gradients. Real processes train, clip, save and load in test_uneven_processes.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from models import SLOW, Block
from random_graphs import Graph, graphs
from test_checker import survivors
from test_rules import overload
from torch import Tensor, fx, nn
from torch.nn import functional as F
from training_oracle import Case
from uses import USES
from uses.arguments import Use, ints, x

import autoshard
from autoshard import Hardware, runtime
from autoshard.checker import check
from autoshard.conversions import CONVERSIONS, Conversion, Step, replace_axis, routes, step_arguments, step_sizes
from autoshard.equations import base
from autoshard.errors import InputError, PlacementError
from autoshard.mesh import MeshSpec
from autoshard.passes import localize_shapes
from autoshard.placements import I, Layout, P, R, S, local_shape, pad, padded_axes, padded_piece, shard, unshard
from autoshard.program import Program, facts, source_of, tensor_operands
from autoshard.simulator import Ranks, SimulatedAxis
from autoshard.testing import OpCase, UnsoundRuleError, check_rule, difference, dual, spread

aten = torch.ops.aten
SHAPES = {2: (7, 9), 3: (8, 11), 4: (7, 15)}
WHOLE = {"P": P, "R": R, "I": I}


def value(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def leaves(pieces: list[Tensor]) -> list[Tensor]:
    return [piece.clone().requires_grad_() for piece in pieces]


# -------------------------------------------------------------------------------------------------------- placements


@pytest.mark.parametrize(
    ("size", "n", "piece"),
    [(50257, 4, 12565), (7, 2, 4), (8, 3, 3), (9, 2, 5), (8, 2, 4), (5, 2, None), (3, 2, None), (9, 8, None), (4, 5, None), (0, 2, None)],
)
def test_length_of_a_padded_piece(size: int, n: int, piece: int | None) -> None:
    """None where a rank would hold padding alone, or more than an eighth would be padding."""
    assert padded_piece(size, n) == piece


@pytest.mark.parametrize(
    ("shape", "layout", "sizes", "wanted"),
    [
        ((257, 4), (S(0),), (4,), (65, 4)),
        ((257, 4), (S(0), S(1)), (4, 2), (65, 2)),
        ((257, 4), (I, S(0)), (2, 4), (65, 4)),
        ((257, 9), (S(0), S(1)), (4, 2), (65, 5)),
        ((257, 4), (S(0), S(0)), (2, 2), None),  # padded pieces do not nest
        ((257, 4), (S(0, (255, 2)),), (4,), None),
    ],
)
def test_local_shape_is_padded(shape: tuple, layout: Layout, sizes: tuple, wanted: tuple | None) -> None:
    assert local_shape(shape, layout, sizes) == wanted


@pytest.mark.parametrize("n", SHAPES)
def test_at_rest_pieces_are_those_of_torch(n: int) -> None:
    whole, mesh = value(SHAPES[n]), MeshSpec(("a",), (n,))
    pieces = [shard(whole, (S(1),), mesh, at) for at in mesh.coordinates()]
    assert all(map(torch.equal, pieces, whole.chunk(n, 1)))
    padded = [pad(piece, (S(1),), whole.shape, mesh) for piece in pieces]
    assert len({piece.shape for piece in padded}) == 1
    assert torch.equal(padded[-1][:, -1], whole[:, -1])
    assert torch.equal(unshard(padded, (S(1),), mesh, whole.shape), whole)


# ------------------------------------------------------------------------------------------------------- conversions


def convert(pieces: list[Tensor], steps: Sequence[Step], layout: Layout, mesh: MeshSpec, shape: tuple[int, ...]) -> list[Tensor]:
    ranks = Ranks(pieces)
    for step in steps:
        args, kwargs = step_arguments(layout, step, shape, mesh.shape), step_sizes(layout, step, shape, mesh.shape)
        ranks = getattr(runtime, step.row.name)(ranks, SimulatedAxis(mesh, mesh.axes[step.axis]), *args, **kwargs)
        layout = replace_axis(layout, step.axis, step.dst)
    return ranks.values


UNEVEN_ROWS = [row for row in CONVERSIONS if "S" in (row.src, row.dst)]
FORMS = [
    (row, shape)
    for row in UNEVEN_ROWS
    for shape in (("uneven", "uneven"), *([("even", "uneven"), ("uneven", "even")] * (row.src == row.dst)))
]


@pytest.mark.parametrize(
    ("row", "form"), FORMS, ids=lambda value: getattr(value, "name", "-".join(value) if isinstance(value, tuple) else "")
)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("n", SHAPES)
def test_conversion_and_its_backward(row: Conversion, form: tuple[str, str], n: int, dim: int) -> None:
    """Of uneven dims; padding of values is a copy of the last slice, of gradients zero."""
    shape = tuple(2 * n if kind == "even" else size for size, kind in zip(SHAPES[n], form, strict=True))
    mesh, generator = MeshSpec(("a",), (n,)), torch.Generator().manual_seed(1)
    src = S(dim) if row.src == "S" else WHOLE[row.src]
    dst = WHOLE[row.dst] if row.dst != "S" else S(1 - dim) if row.src == "S" else S(dim)
    before = leaves(spread(value(shape), (src,), mesh, generator))
    after = convert(before, (Step(0, src, dst),), (src,), mesh, shape)
    assert difference(after, (dst,), value(shape), mesh) == ""
    seeds = spread(value(shape, 7), dual((dst,)), mesh, generator, is_gradient=True)
    torch.autograd.backward(after, seeds)
    grads = [x.grad for x in before]
    assert difference(grads, dual((src,)), value(shape, 7), mesh, is_gradient=True) == ""  # type: ignore[arg-type]

    def pairing(kind: str, pieces: list[Tensor], gradients: list[Any]) -> float:
        total = sum(float((x.detach() * g).sum()) for x, g in zip(pieces, gradients, strict=True))
        return total / n if kind == "I" else total

    assert pairing(row.dst, after, seeds) == pytest.approx(pairing(row.src, before, grads), rel=1e-9)


@st.composite
def moves(draw: st.DrawFn) -> tuple[MeshSpec, tuple[int, ...], Layout, Layout]:
    mesh = draw(st.sampled_from([MeshSpec(("a",), (n,)) for n in SHAPES] + [MeshSpec(("a", "b"), (2, 2)), MeshSpec(("a", "b"), (3, 2))]))
    shape = draw(st.sampled_from([(7, 9), (8, 11), (7, 15), (8, 9), (12, 7)]))
    src, dst = (tuple(draw(st.sampled_from((P, R, I, S(0), S(1)))) for _ in mesh.axes) for _ in range(2))
    assume(local_shape(shape, src, mesh.shape) is not None and local_shape(shape, dst, mesh.shape) is not None)
    return mesh, shape, src, dst


@given(moves())
def test_every_route_keeps_value_and_gradient(move: tuple[MeshSpec, tuple[int, ...], Layout, Layout]) -> None:
    mesh, shape, src, dst = move
    found = routes(src, dst, shape, mesh.shape, True)
    assert found, f"no way from {src} to {dst} on {mesh}"
    for route in found:
        layout, generator = src, torch.Generator().manual_seed(4)
        for step in route:
            layout = replace_axis(layout, step.axis, step.dst)
            assert local_shape(shape, layout, mesh.shape) is not None
        before = leaves(spread(value(shape), src, mesh, generator))
        after = convert(before, route, src, mesh, shape)
        assert difference(after, dst, value(shape), mesh) == "", route
        torch.autograd.backward(after, spread(value(shape, 5), dual(dst), mesh, generator, is_gradient=True))
        assert difference([x.grad for x in before], dual(src), value(shape, 5), mesh, is_gradient=True) == "", route  # type: ignore[misc]


def test_wire_bytes_are_those_of_the_padded_dim() -> None:
    from autoshard.conversion_table import ConversionTable
    from autoshard.costs import CostModel
    from autoshard.hardware import hardware_of
    from autoshard.ops.row import TensorInfo

    model = CostModel(MeshSpec.of("a=4,b=2"), hardware_of("h100"))
    for shape in ((257, 9), (260, 10), (257, 6)):
        info = TensorInfo(shape, torch.float64, True)
        padded = 8 * -(-shape[0] // 4) * 4 * -(-shape[1] // 2) * 2
        assert model.local_bytes(info, (S(0), S(1))) == pytest.approx(padded / 8)
        assert model.whole_bytes(Step(0, S(0), R), info, (S(0), S(1))) == pytest.approx(padded / 2)
        assert model.whole_bytes(Step(0, S(0), S(1)), info, (S(0), I)) == pytest.approx(8 * -(-shape[0] // 4) * 4 * -(-shape[1] // 4) * 4)
        layouts = [x for x in itertools.product((P, R, I, S(0), S(1)), repeat=2) if local_shape(shape, x, (4, 2))]
        table = ConversionTable(model).seconds(layouts, layouts, info)
        for (i, a), (j, b) in itertools.product(enumerate(layouts), repeat=2):
            best = model.best_route(a, b, info)
            assert best is not None
            assert table[i, j] == pytest.approx(best[0]), (a, b)


# --------------------------------------------------------------------------------------------------------------- ops

LENGTHS = {4: 7, 6: 15, 8: 9, 12: 23}


def resized(tree: Any) -> Any:
    """The same arguments with dims of other lengths: tensors repeat their slices, slightly changed; lists are shapes where they can be."""
    if isinstance(tree, Tensor):
        for dim, size in enumerate(tree.shape):
            tree = tree.index_select(dim, torch.arange(LENGTHS.get(size, size)) % size)
        noise = torch.rand(tree.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return tree * (1 + 0.1 * noise) if tree.dtype == torch.float64 else tree
    if isinstance(tree, (list, tuple)):
        return [LENGTHS.get(item, item) if isinstance(item, int) and not isinstance(item, bool) else resized(item) for item in tree]
    return tree


def resized_use(name: str, row: Use) -> tuple[tuple, dict[str, Any]] | None:
    """The use with other lengths; None where its arguments do not fit together then."""
    buffers = {id(t) for t in row.args if isinstance(t, nn.Buffer)}
    args = tuple(nn.Buffer(resized(a.data)) if id(a) in buffers else resized(a) for a in row.args)
    kwargs = {key: resized(item) for key, item in row.kwargs.items()}
    try:
        OpCase(overload(name), args, kwargs, MeshSpec.of("a=2")).candidates({})
    except Exception:  # what an op raises for arguments that do not fit
        return None
    return args, kwargs


_CRASHES = ("lstm", "gru", "rnn")  # recurrent ops read past the end of weights of other lengths
RESIZED = [
    (name, k, found)
    for name, rows in USES.items()
    if not any(part in name for part in _CRASHES)
    for k, row in enumerate(rows)
    if (found := resized_use(name, row))
]


@pytest.mark.filterwarnings("ignore:The use of `x.T`")
@pytest.mark.parametrize(
    ("name", "args", "kwargs"), [pytest.param(n, *found, id=f"{n.removeprefix('aten.')}-{k}") for n, k, found in RESIZED]
)
def test_rule_on_lengths_that_do_not_divide(name: str, args: tuple, kwargs: dict[str, Any]) -> None:
    for mesh in ("a=2", "a=4", "a=2,b=2"):
        check_rule(overload(name), *args, mesh=mesh, **kwargs)


def test_most_uses_can_be_resized() -> None:
    assert len({name for name, *_ in RESIZED}) > 0.7 * len(USES)


def padded_factors(op: Any, *args: Any, mesh: str = "a=2", **kwargs: Any) -> set[str]:
    """Factors that some proved strategy splits into padded pieces."""
    case = OpCase(op, args, kwargs, MeshSpec.of(mesh))
    check_rule(op, *args, mesh=mesh, **kwargs)
    shapes = [*(x.shape for x in case.operands), *(y.shape for y in case.outputs)]
    return {
        base(strategy.factor)
        for candidate in case.candidates({})
        for strategy in candidate.strategies
        if any(
            padded_axes(shape, layout, case.mesh.shape)
            for shape, layout in zip(shapes, (*candidate.inputs, *candidate.outputs), strict=True)
        )
    } - {""}


@pytest.mark.parametrize(
    ("op", "args", "wanted"),
    [
        (aten.linear.default, (x(7, 9), x(15, 9), x(15)), "b i o"),
        (aten.matmul.default, (x(2, 7, 9), x(2, 9, 15)), "m k n"),
        (aten.bmm.default, (x(7, 9, 2), x(7, 2, 15)), "b m n"),
        (aten.add.Tensor, (x(7, 9), x(9)), "p"),
        (aten.gelu.default, (x(7, 9),), "p"),
        (aten.sum.dim_IntList, (x(7, 9), [0]), "d k"),
        (aten.mean.dim, (x(7, 9), [0]), "d k"),
        (aten.mean.default, (x(7, 9),), "d"),
        (aten.embedding.default, (x(23, 9), ints(23, 7)), "v h b"),
        (aten.embedding.default, (x(23, 9), ints(23, 7), 22), "v h b"),
        (aten.cross_entropy_loss.default, (x(4, 23), ints(23, 4)), "c"),
        (aten.cross_entropy_loss.default, (x(4, 23), ints(23, 4), nn.Buffer(x(23).abs()), 1, 3, 0.1), "c"),
        (aten.cross_entropy_loss.default, (x(4, 23, 2), ints(23, 4, 2), nn.Buffer(x(23).abs()), 2), "c"),
        (aten.cross_entropy_loss.default, (x(23), ints(23), None, 0, -100, 0.3), "c"),
        (aten.layer_norm.default, (x(7, 9, 4), [4], x(4), x(4)), "b"),
        (aten.scaled_dot_product_attention.default, (x(2, 7, 9, 2), x(2, 7, 9, 2), x(2, 7, 9, 15)), "b q e"),
        (aten.scaled_dot_product_attention.default, (x(2, 7, 9, 2), x(2, 7, 9, 2), x(2, 7, 9, 15), None, 0.0, True), "b e"),
        (aten.conv1d.default, (x(7, 9, 4), x(15, 9, 3), x(15)), "b i o"),
        (aten.view.default, (x(7, 6, 9), [7, 2, 3, 9]), "f"),
        # Not split: pieces of product dims and joined ones, samples of a loss and of statistics.
        (aten.view.default, (x(7, 2, 9), [14, 9]), "f"),
        (aten.cat.default, ([x(7, 4), x(9, 4)], 0), ""),
        (aten.cross_entropy_loss.default, (x(7, 4), ints(4, 7)), ""),
        (aten.batch_norm.default, (x(7, 4), x(4), x(4), None, None, True, 0.1, 1e-5, False), ""),
    ],
    ids=str,
)
def test_what_is_split_where_it_does_not_divide(op: Any, args: tuple, wanted: str) -> None:
    assert padded_factors(op, *args) == set(wanted.split())


def test_a_sum_without_its_mask_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localize_shapes, "masks_of", lambda *_: [])
    for op, args in ((aten.linear.default, (x(4, 7), x(6, 7))), (aten.mean.dim, (x(7, 4), [0])), (aten.sum.default, (x(7),))):
        with pytest.raises(UnsoundRuleError, match="differs by"):
            check_rule(op, *args)


def test_a_lowering_that_does_not_know_the_length_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localize_shapes, "lowered_sizes", lambda *_: {})
    for op, args in ((aten.cross_entropy_loss.default, (x(4, 7), ints(7, 4))), (aten.mean.dim, (x(7, 4), [0]))):
        with pytest.raises(UnsoundRuleError, match="differs by"):
            check_rule(op, *args)


def test_an_index_past_the_last_row_is_refused() -> None:
    """Row 7 of a table of 7 exists on the last rank, as padding."""
    axis = SimulatedAxis(MeshSpec.of("a=2"), "a")
    table = Ranks(spread(value((7, 2)), (S(0),), axis.mesh, torch.Generator()))
    with pytest.raises(RuntimeError, match="index out of range"):
        runtime.embedding(table, Ranks([torch.tensor([7])] * 2), row_axes=(axis,), row_sizes=(7,))  # type: ignore[arg-type]
    logits = Ranks(spread(value((2, 7)), (S(1),), axis.mesh, torch.Generator()))
    with pytest.raises(RuntimeError, match="target out of range"):
        runtime.cross_entropy(logits, Ranks([torch.tensor([7, 0])] * 2), class_axes=(axis,), class_sizes=(7,))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ whole models

VOCAB, LENGTH = 257, 9


class GPT(nn.Module):
    """A GPT none of whose sizes is round: vocabulary 257, nine positions, hidden layer of 63."""

    def __init__(self, vocab: int = VOCAB, length: int = LENGTH, width: int = 16) -> None:
        super().__init__()
        self.vocab = vocab
        self.tok, self.pos = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.block = Block(width, 4, 0.0)
        self.block.up, self.block.down = nn.Linear(width, 4 * width - 1), nn.Linear(4 * width - 1, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tok.weight

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.block(self.tok(ids) + self.pos(torch.arange(ids.shape[1], device=ids.device)))
        return F.cross_entropy(self.head(self.norm(x)).view(-1, self.vocab), labels.view(-1))


def gpt(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return GPT().double()


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (4, LENGTH), generator=generator), torch.randint(0, VOCAB, (4, LENGTH), generator=generator)


# Slow at computing, with links of no latency over which weights do not fit: what the solver splits like a large model.
NARROW = Hardware.uniform(
    "narrow",
    flops_per_s=6e8,
    memory_bytes_per_s=1e9,
    memory_bytes=1e12,
    link_bytes_per_s=1e7,
    collective_latency_s=1e-9,
    kernel_latency_s=1e-9,
)
UNEVEN = {"tok.weight": "S(0)@tp", "block.up.weight": "S(0)@tp", "block.down.weight": "S(1)@tp", "block.up.bias": "S(0)@tp"}


@pytest.fixture(scope="module")
def case() -> Case:
    return Case.of(gpt(), dict(zip(("ids", "labels"), batch(), strict=True)), "dp=2,tp=2")


@pytest.mark.parametrize("mesh", ["tp=2", "tp=4", "dp=2,tp=2"])
@pytest.mark.parametrize("template", ["megatron", "megatron_sp"])
def test_gpt_trains_as_on_one_device(case: Case, mesh: str, template: Any) -> None:
    plan = autoshard.plan(case.model, mesh, (), case.arguments, template=template, constraints=UNEVEN, hardware=NARROW)
    for is_text in (False, True):
        case.prove(plan.program, is_text)
    text = plan.program.source
    assert 'pad_shard(self.tensor("head.weight"), tp, 0, size=257)' in text
    assert "row_axes=(tp,), row_sizes=(257,)" in text
    assert "class_axes=(tp,), class_sizes=(257,)" in text
    assert "mask_padding(" in text


def test_gpt_under_random_plans(case: Case) -> None:
    reached: Counter[str] = Counter()
    for seed, mesh in enumerate(["tp=2", "tp=4", "dp=2,tp=2", "tp=3", "dp=2,tp=4"] * 2):
        program = case.plan(mesh, seed, is_scattered=seed % 2 == 0)
        case.prove(program, is_text=seed % 3 == 0)
        reached.update(
            node.target.__name__ for node in program.nodes("conversion", "mask") if "size" in node.kwargs or "cut_size" in node.kwargs
        )  # type: ignore[union-attr]
    assert {"all_gather", "reduce_scatter", "slice_invariant", "slice_varying", "all_to_all", "mask_padding"} <= set(reached), reached


@pytest.mark.parametrize(("mesh", "template"), [("tp=4", "megatron"), ("tp=4", "auto"), ("dp=2,tp=4", "megatron")])
def test_the_search_splits_the_vocabulary_of_gpt2(mesh: str, template: Any) -> None:
    with torch.device("meta"):
        model, ids = GPT(50257, 1024, 768).to(torch.bfloat16), torch.zeros(8, 1024, dtype=torch.long)
    plan = autoshard.plan(model, mesh, (ids, ids), template=template, hardware="h100")
    assert plan.parameter_layouts["head.weight"][-1] == S(0)
    assert "class_sizes=(50257,)" in plan.program.source


def test_a_saved_plan_is_the_same_program(tmp_path: Any) -> None:
    plan = autoshard.plan(gpt(), "tp=2", batch(), template="megatron", constraints=UNEVEN)
    plan.save(tmp_path / "plan.json")
    again = autoshard.Plan.load(tmp_path / "plan.json")
    assert again.program.source == plan.program.source
    assert autoshard.verify(gpt(), again, batch()).is_equal


def test_what_leaves_is_whole_where_it_does_not_divide() -> None:
    model = nn.Linear(4, 7).double()
    for outputs in ("whole", "dtensor"):
        plan = autoshard.plan(model, "tp=2", (value((4, 4)),), outputs=outputs, constraints={"weight": "S(0)@tp"}, hardware=SLOW)  # type: ignore[arg-type]
        node = plan.program.output.args[0][0]  # type: ignore[index]
        assert not padded_axes(facts(node).value.shape, facts(node).layout, (2,))
        assert autoshard.verify(model, plan, (value((4, 4)),)).is_equal


@settings(max_examples=max(settings().max_examples // 3, 1))
@given(
    graphs(8, is_odd=True),
    st.lists(st.tuples(st.sampled_from(("a=2", "a=3", "a=4", "a=2,b=2")), st.integers(0, 9999), st.booleans()), min_size=2, max_size=4),
)
def test_random_models_of_odd_sizes_train_as_one_device(graph: Graph, plans: list[tuple[str, int, bool]]) -> None:
    case = Case.of(graph.model(), graph.arguments())
    for mesh, seed, is_scattered in plans:
        program = case.plan(mesh, seed, is_scattered=is_scattered)
        for node in program.nodes("conversion", "mask", "parameter"):
            if padded_axes(facts(node).value.shape, facts(node).layout, program.mesh.shape):
                event(f"padded {facts(node).role}")
        case.prove(program, is_text=seed % 3 == 0)


# ------------------------------------------------------------------------------------------------------- the checker


def mutants(program: Program, node: fx.Node) -> Any:
    """Changes to what a node says about padding."""
    for key, size in node.kwargs.items():
        if "size" not in key:
            continue
        for other in (size + 1, size - 1, 0) if isinstance(size, int) else ((size[0] + 1,), (0,), ()):
            yield f"another {key}", lambda there, _, key=key, other=other: there.update_kwarg(key, other)
        yield f"no {key}", lambda there, _, key=key: setattr(there, "kwargs", {k: v for k, v in there.kwargs.items() if k != key})
    if facts(node).role == "conversion":
        yield (
            "a size that none has",
            lambda there, _: setattr(there, "kwargs", {**there.kwargs, "cut_size" if "cut_size" not in there.kwargs else "size": 9}),
        )
    if facts(node).role == "mask":
        yield "not masked", lambda there, _: there.replace_all_uses_with(there.args[0])
        yield "another dim", lambda there, _: there.update_arg(2, 1 - there.args[2])
        yield "another function", lambda there, _: setattr(there, "target", runtime.pad_shard)
        yield "the whole value", lambda there, _: setattr(facts(there), "layouts", ((R,) * program.mesh.ndim,))
    if facts(node).role == "op":
        for k, operand in enumerate(tensor_operands(node)):
            for axis, dim in padded_axes(facts(operand).value.shape, facts(operand).layout, program.mesh.shape):
                if facts(operand).role != "mask":
                    yield "masked in vain", lambda there, mutant, k=k, axis=axis, dim=dim: add_mask(mutant, there, k, axis, dim)


def add_mask(program: Program, node: fx.Node, k: int, axis: int, dim: int) -> None:
    source = tensor_operands(node)[k]
    with program.graph.inserting_before(node):
        args = (source, program.mesh.axes[axis], dim)
        mask = program.graph.create_node("call_function", runtime.mask_padding, args, {"size": facts(source).value.shape[dim]})
    mask.meta["autoshard"] = replace(facts(source), role="mask")
    node.replace_input_with(source, mask)


@pytest.mark.parametrize("template", ["megatron", "megatron_sp"])
def test_every_change_to_padding_is_refused(template: Any) -> None:
    program = autoshard.plan(gpt(), "dp=2,tp=2", batch(), template=template, constraints=UNEVEN, hardware=NARROW).program
    check(program)
    tried: Counter[str] = Counter()
    every = [n for n in program.nodes("conversion", "mask", "op") if any("size" in key for key in n.kwargs) or facts(n).role == "op"]
    passed = [text for node in every for text in survivors(program, node, mutants(program, node), tried)]
    assert not passed, f"{len(passed)} of {tried.total()} mutants pass: {passed[:10]}"
    assert {"not masked", "masked in vain", "no size", "another size", "another row_sizes", "no class_sizes"} <= set(tried), tried


def test_a_masked_value_goes_nowhere_else() -> None:
    program = autoshard.plan(gpt(), "tp=2", batch(), template="megatron", constraints=UNEVEN).program
    mask = next(program.nodes("mask"))
    mask_of = source_of(mask)
    assert facts(mask_of).role != "mask"
    program.output.update_arg(0, [mask])
    with pytest.raises(PlacementError, match="with padding"):
        check(program)


def test_a_length_that_wastes_too_much_says_what_would_work() -> None:
    with pytest.raises(autoshard.AutoshardError, match=r"dim 0 has size 5, axis tp of 2 ranks needs a multiple of 2: 4 or 6 would work"):
        autoshard.plan(nn.Linear(4, 5), "tp=2", (torch.randn(2, 4),), constraints={"weight": "S(0)@tp"})


def test_a_batch_that_does_not_divide_is_still_refused_by_templates() -> None:
    with pytest.raises(InputError, match="which does not divide"):
        autoshard.plan(nn.Linear(4, 4), "dp=2", (torch.randn(7, 4),), template="ddp")
