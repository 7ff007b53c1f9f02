"""Every row of the op table, proved by execution: each strategy of each use below is run and compared with the op itself.

A row of USES reads: what the rule may split (factors), `P` when it also passes terms on, then the op's arguments. Factors:
b.0, b.1, ... the dims of `b*` from the right; d0, d1, ... dims; f0, f1, ... pieces of reshaped dims; q0 a group of pieces split together.
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from uses import USES
from uses.arguments import Use, ints, x
from uses.random import DRAWN

from autoshard import runtime
from autoshard.candidates import CandidateTable
from autoshard.costs import CostModel
from autoshard.errors import RuleError
from autoshard.hardware import hardware_of
from autoshard.mesh import MeshSpec
from autoshard.ops import RULES
from autoshard.ops.row import Rule
from autoshard.placements import P, R, shard, unshard
from autoshard.rules import catalogue, register_rule
from autoshard.testing import OpCase, UnsoundRuleError, check_rule

aten = torch.ops.aten


def overload(name: str) -> Any:
    """An op, or what passes put in the place of several: a function of the runtime."""
    if "." not in name:
        return getattr(runtime, name)
    namespace, base, variant = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), base), variant)


CASES = [pytest.param(name, row, id=f"{name.removeprefix('aten.')}-{k}") for name, rows in USES.items() for k, row in enumerate(rows)]


def test_every_row_is_proved_here() -> None:
    proved = {**{op: rows for op, rows in USES.items() if rows}, **DRAWN}
    assert sorted(RULES) == sorted(proved), "every op of the table has uses in tests/uses"


@pytest.mark.filterwarnings("ignore:The use of `x.T`")
@pytest.mark.parametrize(("name", "row"), CASES)
def test_rule(name: str, row: Use) -> None:
    """On two ranks every promised factor is split; then three ranks, and two axes jointly."""
    proved = check_rule(overload(name), *row.args, **row.kwargs)
    split = [strategy.factor or "P" * any(placement.kind == "P" for placement in strategy.inputs) for (strategy,) in proved]
    assert " ".join(dict.fromkeys(factor for factor in split if factor)) == row.splits
    check_rule(overload(name), *row.args, mesh="a=3", **row.kwargs)
    check_rule(overload(name), *row.args, mesh="a=2,b=2", **row.kwargs)


@pytest.mark.parametrize("name", ["linear", "matmul", "cat", "reshape", "scaled_dot_product_attention", "cross_entropy_loss", "conv1d"])
def test_rule_on_unequal_axes(name: str) -> None:
    for row in USES[f"aten.{name}.default"]:
        check_rule(overload(f"aten.{name}.default"), *row.args, mesh="a=2,b=3", **row.kwargs)


# Uses whose dims are also cut in segments, as the dims of fused weights are, and a placement that must be among the strategies.
SEGMENTED = {
    "fused-weight": ("aten.linear.default", (x(4, 6), x(24, 6), x(24)), {24: [(8, 8, 8), (16, 8), (8, 16), (12, 12)]}, "S(0:3x8)"),
    "fused-weight-in": ("aten.linear.default", (x(4, 24), x(6, 24)), {24: [(8, 16)]}, "S(1:8+16)"),
    "split": ("aten.split_with_sizes.default", (x(4, 24), [16, 4, 4], -1), {24: [(12, 12)]}, "S(1:16+4+4)"),
    "chunk": ("aten.chunk.default", (x(4, 12), 3, 1), {4: [(2, 2)]}, "S(1:3x4)"),
    "cat": ("aten.cat.default", ([x(4, 8), x(4, 4)], 1), {}, "S(1)"),
    "heads": ("aten.view.default", (x(4, 24), [4, 3, 4, 2]), {4: [(2, 2)]}, "S(1:3x8)"),
    "add": ("aten.add.Tensor", (x(4, 12), x(12)), {12: [(4, 8), (6, 6)]}, "S(1:4+8)"),
    "embedding": ("aten.embedding.default", (x(12, 8), ints(12, 12)), {12: [(6, 6), (4, 8)], 8: [(4, 4)]}, "S(1:2x4)"),
    "cross-entropy": ("aten.cross_entropy_loss.default", (x(8, 12), ints(12, 8)), {12: [(6, 6), (4, 8)], 8: [(4, 4)]}, "S(0:2x4)"),
    "batch-norm": ("aten.batch_norm.default", (x(8, 4), x(4), x(4), None, None, True, 0.1, 1e-5, False), {8: [(4, 4)]}, "S(0:2x4)"),
    "mean": ("aten.mean.dim", (x(8, 4), [0]), {8: [(4, 4)]}, "S(0:2x4)"),
    "expand": ("aten.expand.default", (x(1, 4), [12, 4]), {12: [(4, 8)]}, "S(0:4+8)"),
}


@pytest.mark.parametrize(("name", "args", "segmentations", "wanted"), SEGMENTED.values(), ids=SEGMENTED)
@pytest.mark.parametrize("mesh", ["a=2", "a=2,b=2"])
def test_segmented_split(name: str, args: tuple, segmentations: dict, wanted: str, mesh: str) -> None:
    proved = check_rule(overload(name), *args, mesh=mesh, segmentations=segmentations)
    placements = {str(placement) for joint in proved for strategy in joint for placement in (*strategy.inputs, *strategy.outputs)}
    assert wanted in placements


@pytest.mark.parametrize("name", ["aten.embedding.default", "aten.cross_entropy_loss.default"])
def test_lowering_that_counts_positions_takes_no_segments(name: str) -> None:
    args = next(case[1] for case in SEGMENTED.values() if case[0] == name)
    proved = check_rule(overload(name), *args, segmentations={12: [(6, 6)]})
    assert not any(placement.segments for (strategy,) in proved if strategy.factor in ("v", "c") for placement in strategy.inputs)


# Dropout draws differently on each rank, so it is proved by what it must keep: its own scale, and one mask per value.
@pytest.mark.parametrize("mesh", ["a=2", "a=2,b=2"])
def test_dropout_draws_once_per_value(mesh: str) -> None:
    case = OpCase(aten.dropout.default, (torch.ones(8, 12, dtype=torch.float64), 0.5, True), {}, MeshSpec.of(mesh))
    quiet = OpCase(aten.dropout.default, (torch.ones(8, 12, dtype=torch.float64), 0.5, False), {}, MeshSpec.of(mesh))
    for candidate in quiet.candidates({}):
        run = case.run(candidate)
        ranks = case.mesh.coordinates()
        layout = tuple(R if placement == P else placement for placement in candidate.outputs[0])
        whole = unshard(run.outputs[0], candidate.outputs[0], case.mesh)
        for at, piece, taken in zip(ranks, run.outputs[0], run.operands[0], strict=True):
            if P not in candidate.outputs[0]:
                torch.testing.assert_close(piece.detach(), shard(whole.detach(), layout, case.mesh, at))
            mask = piece.detach() / taken.detach()
            assert set(mask.round(decimals=9).unique().tolist()) == {0.0, 2.0}
        masks = [(piece / taken).detach() for piece, taken in zip(run.outputs[0], run.operands[0], strict=True)]
        positions = [tuple(c for c, p in zip(at, candidate.outputs[0], strict=True) if p.is_split) for at in ranks]
        for i, j in itertools.combinations(range(len(ranks)), 2):
            assert torch.allclose(masks[i], masks[j]) == (positions[i] == positions[j])


@pytest.mark.parametrize("mesh", ["a=2", "a=2,b=2"])
def test_attention_dropout_draws_once_per_probability(mesh: str) -> None:
    """The values are unit matrices side by side, so that results are probabilities: a split of `e` must not change the draws.

    Keys stay whole: each probability is drawn once.
    """
    query, key, value = x(4, 4, 6, 2), x(4, 4, 6, 2), torch.eye(6, dtype=torch.float64).repeat(4, 4, 1, 4)
    quiet = OpCase(aten.scaled_dot_product_attention.default, (query, key, value), {}, MeshSpec.of(mesh))
    case = OpCase(aten.scaled_dot_product_attention.default, (query, key, value, None, 0.5), {}, MeshSpec.of(mesh))
    program, node = case.program()
    candidates = CandidateTable(program, CostModel(case.mesh, hardware_of("cpu"))).of_op(node)
    assert {strategy.factor for candidate in candidates for strategy in candidate.strategies} == {"", "b.1", "b.0", "q", "e"}
    for candidate in candidates:
        drawn = unshard(case.run(candidate).outputs[0], candidate.outputs[0], case.mesh)
        if P in candidate.outputs[0]:
            continue  # terms of the values: no unit matrices
        kept = (drawn / quiet.outputs[0]).detach().round(decimals=9)
        assert set(kept.unique().tolist()) == {0.0, 2.0}
        for part in kept.chunk(4, -1):
            torch.testing.assert_close(part, kept[..., :6])
        if any(strategy.factor in ("b.1", "b.0", "q") for strategy in candidate.strategies):
            for strategy, dim in ((s, s.outputs[0].dim) for s in candidate.strategies if s.factor in ("b.1", "b.0", "q")):
                first, second = kept.chunk(2, dim)
                assert not torch.equal(first, second), strategy


@pytest.mark.parametrize("mesh", ["a=2", "a=2,b=2"])
@pytest.mark.parametrize("name", DRAWN)
def test_pieces_draw_by_themselves(name: str, mesh: str) -> None:
    case = OpCase(overload(name), DRAWN[name].args, {}, MeshSpec.of(mesh))
    candidates, ranks = case.candidates({}), case.mesh.coordinates()
    factors = [strategy.factor for candidate in candidates for strategy in candidate.strategies]
    assert " ".join(dict.fromkeys(filter(None, factors))) == DRAWN[name].splits
    for candidate in candidates:
        pieces = [piece.detach() for piece in case.run(candidate).outputs[0]]
        assert {tuple(piece.shape) for piece in pieces} == {tuple(shard(case.outputs[0], candidate.outputs[0], case.mesh, ranks[0]).shape)}
        positions = [tuple(c for c, p in zip(at, candidate.outputs[0], strict=True) if p.is_split) for at in ranks]
        for i, j in itertools.combinations(range(len(ranks)), 2):
            assert torch.equal(pieces[i], pieces[j]) == (positions[i] == positions[j])


def test_random_call_is_not_compared() -> None:
    with pytest.raises(RuleError, match=r"this call of aten.dropout.default draws random numbers: prove it with the draws turned off"):
        check_rule(aten.dropout.default, x(4, 6), 0.5, True)


def test_op_without_a_row() -> None:
    with pytest.raises(RuleError, match=r"aten.matrix_exp.default has no rule: autoshard.register_rule adds one"):
        check_rule("aten::matrix_exp", x(4, 4))
    with pytest.raises(RuleError, match=r"no op 'aten::no_such_op': import or define it first \(write it as 'namespace::name'\)"):
        check_rule("aten::no_such_op", x(4))


@pytest.fixture
def scale() -> Iterator[torch._ops.OpOverload]:
    """A custom op, x * w summed over the last dim, whose row is forgotten afterwards."""
    library = torch.library.Library("autoshard_test", "FRAGMENT")
    library.define("scale(Tensor x, Tensor w) -> Tensor")
    library.impl("scale", lambda x, w: (x.exp() * w).sum(-1), "CompositeImplicitAutograd")
    yield torch.ops.autoshard_test.scale.default
    RULES.pop("autoshard_test.scale.default", None)
    library._destroy()


def test_right_rule_of_a_custom_op(scale: torch._ops.OpOverload) -> None:
    register_rule("autoshard_test::scale", "b* i, ~i -> b*")
    assert len(check_rule("autoshard_test::scale", x(4, 6), x(6))) == 5
    check_rule(scale, x(4, 6), x(6), mesh="a=2,b=3")


def test_wrong_rule_of_a_custom_op(scale: torch._ops.OpOverload) -> None:
    register_rule("autoshard_test::scale", "~b* i, ~i -> b*")
    with pytest.raises(UnsoundRuleError) as caught:
        check_rule(scale, x(4, 6), x(6))
    text = re.sub(r"-?\d+\.\d+", "#", re.sub(r"by \d\S*", "by #", str(caught.value)))
    assert text == (
        "the rule of autoshard_test.scale.default, '~b* i, ~i -> b*', is wrong for shapes [[4, 6], [6]] on mesh a=2: "
        "1 of 6 strategies fail\n"
        "  nothing split: x P, w R -> P: output differs by #\n"
        "  smallest counterexample: x = [[#]], w = [#]: nothing split: x P, w R -> P: output differs by #"
    )
    register_rule("autoshard_test::scale", "b* i, i -> b* i")
    with pytest.raises(RuleError, match="does not fit shapes"):
        check_rule(scale, x(4, 6), x(6))


# A wrong row for an op, and what the report says.
REFUTED = {
    "max is no sum": ("amax.default", "b i -> b", (x(4, 6), [1]), "i split on a: self S(1) -> P: output differs by"),
    "softmax dim": ("softmax.int", "b i -> b i", (x(4, 6), 1), "i split on a: self S(1) -> S(1): output differs by"),
    "bias without its mark": ("linear.default", "b i, o i, o -> b o", (x(4, 6), x(2, 6), x(2)), "bias R -> P: output differs by"),
    "linear in each, not in both": ("mul.Tensor", "+p*, +p* -> p*", (x(4, 6), x(4, 6)), "self P, other P -> P: output differs by"),
    "affine": ("add.Scalar", "~p* -> p*", (x(4, 6), 1.0), "nothing split: self P -> P: output differs by"),
    "moved dim": ("flip.default", "a -> a", (x(4), [0]), "a split on a: self S(0) -> S(0): output differs by"),
    "shape that is an argument": ("view.default", "a b -> a b", (x(4, 6), [4, 6]), "raises RuntimeError: shape '[4, 6]' is invalid"),
    "statistics of a piece": ("batch_norm.default", "b c -> b c", (x(4, 6), *[None] * 4, True, 0.1, 1e-5, False), "b split on a"),
    "gradient alone": ("embedding.default", "v h, b -> b h", (x(4, 6), ints(4, 8), -1, True), "gradient of weight differs by"),
}


@pytest.mark.parametrize("case", REFUTED.values(), ids=REFUTED)
def test_wrong_rows_of_torch_ops_are_refuted(case: tuple[str, str, tuple, str], monkeypatch: pytest.MonkeyPatch) -> None:
    name, equation, args, text = case
    monkeypatch.setitem(RULES, f"aten.{name}", Rule(equation))
    with pytest.raises(UnsoundRuleError, match=re.escape(text)):
        check_rule(f"aten::{name}", *args)


def test_docs_list_every_row(request: pytest.FixtureRequest) -> None:
    written = Path(__file__).parent.parent / "docs" / "ops.md"
    if request.config.getoption("--update-golden"):
        written.write_text(catalogue())
    assert written.read_text() == catalogue(), "docs/ops.md is stale; its first lines say how to make it anew"
