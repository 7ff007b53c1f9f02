"""Sizes that change from call to call: one trace and one plan serve them, equal to the single device at every one."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import GPT, MLP, SLOW, VOCAB, Attention, ConvNet
from processes import run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.export import Dim

import autoshard
from autoshard import plan_file, planner
from autoshard.errors import AutoshardError, InputError, PlanError, TraceError
from autoshard.instantiation import instantiate, split_sizes
from autoshard.mesh import MeshSpec
from autoshard.placements import I, R, S, local_shape
from autoshard.program import facts
from autoshard.symbolic import Size, Symbol, evaluate, parse, positive, short, text_of

# ------------------------------------------------------------------------------------------------------- expressions

SYMBOLS = {"batch": Symbol("batch", 4), "seq": Symbol("seq", 8)}
TEXTS = [
    "batch",
    "8*batch",
    "batch // 2",
    "3*(batch // 2)",
    "(batch*seq) // 2",
    "(batch + 1) // 2",
    "batch % 4",
    "max(batch, seq - 1)",
    "1/batch",
]


@pytest.mark.parametrize("text", TEXTS)
def test_an_expression_reads_as_it_is_written(text: str) -> None:
    assert text_of(parse(text, SYMBOLS)) == text


expressions = st.recursive(
    st.sampled_from(["batch", "seq", "2", "3", "7"]),
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*"]), inner),
        st.builds("({} {} {})".format, inner, st.sampled_from(["//", "%"]), st.sampled_from(["2", "4", "batch", "(seq + 1)"])),
        st.builds("{}({}, {})".format, st.sampled_from(["max", "min"]), inner, inner),
        st.builds("({} if {} {} {} else {})".format, inner, inner, st.sampled_from(["<", ">=", "==", "!="]), inner, inner),
    ),
    max_leaves=6,
)


@pytest.mark.hypothesis
@given(expressions, st.integers(2, 50), st.integers(2, 50))
def test_simplified_expressions_have_the_value_of_the_originals(text: str, batch: int, seq: int) -> None:
    values = {"batch": batch, "seq": seq}
    written = text_of(parse(text, SYMBOLS))
    assert evaluate(written, values) == eval(text, {"max": max, "min": min}, dict(values))
    assert text_of(parse(written, SYMBOLS)) == written


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "batch.real",
        "[batch]",
        "other",
        "9**9**9",
        "batch << 9",
        "'a'*9",
        "batch if 1 else 2",
        "batch if seq < 2 < 3 else 2",
        "batch if seq in 3 else 2",
        "f(2)",
        "max(*[1])",
        "",
        "2//0",
        "True",
    ],
)
def test_nothing_else_is_read(text: str) -> None:
    with pytest.raises(PlanError):
        evaluate(text, {"batch": 4, "seq": 8})
    if text != "2//0":
        with pytest.raises(PlanError):
            parse(text, SYMBOLS)


def test_a_size_is_a_number_that_knows_what_it_stands_for() -> None:
    size = Size(8, positive("batch"))
    assert (size, hash(size), size * 2, [size][0] % 3) == (8, hash(8), 16, 2)
    assert type(size * 2) is int
    assert (str(size // 2 // 2), size // 2 // 2, short(size // 4)) == ("batch // 4", 2, "batch/4")
    assert copy.deepcopy(size).expr == size.expr
    assert local_shape((size, 6), (S(0), S(0)), (2, 2)) == (2, 6)
    assert local_shape((size, 6), (S(0, (4, 4)),), (2,)) is None  # segments are fixed lengths
    assert local_shape((8, 6), (S(0, (4, 4)),), (2,)) == (4, 6)


# ------------------------------------------------------------------------------------------------------------ models


class LongGPT(GPT):
    """More positions than any test needs."""

    def __init__(self) -> None:
        super().__init__()
        self.pos = nn.Embedding(32, 16)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": VOCAB, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**heads, **sizes, use_cache=False))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": VOCAB}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(**sizes, **quiet, max_position_embeddings=32))


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def labelled(batch: int, length: int) -> tuple[tuple, dict]:
    return (), {"input_ids": tokens(batch, length), "labels": tokens(batch, length, 1)}


def masked(batch: int, length: int) -> tuple[tuple, dict]:
    return (), {**labelled(batch, length)[1], "attention_mask": (tokens(batch, length, 2) > 5).long()}


BOTH = {0: "batch", 1: "seq"}
UP_TO_32 = {0: "batch", 1: Dim("seq", max=32)}
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], tuple[tuple, dict]], Any]] = {
    "mlp": (MLP, lambda batch, _: ((normal(batch, 8),), {}), "batch"),
    "conv_net": (ConvNet, lambda batch, _: ((normal(batch, 3, 8, 8), tokens(batch, 1)[:, 0] % 4), {}), "batch"),
    "gpt": (LongGPT, lambda batch, length: ((tokens(batch, length), tokens(batch, length, 1)), {}), {"ids": BOTH, "labels": BOTH}),
    "llama": (llama, labelled, {"input_ids": BOTH, "labels": BOTH}),
    "bert": (bert, masked, dict.fromkeys(("input_ids", "labels", "attention_mask"), UP_TO_32)),
    "bert, batch alone": (bert, lambda batch, _: masked(batch, 8), "batch"),
}
MESHES = ("dp=2", "dp=2,tp=2")
SIZES = [(4, 8), (8, 16), (12, 4), (16, 8)]  # the plan is made at the first


@cache
def made(case: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[case][0]().double()


@cache
def planned(case: str, mesh: str, how: str | int) -> autoshard.Plan:
    _, batch, dynamic = CASES[case]
    asked: Any = {"template": how} if isinstance(how, str) else {"options": autoshard.Options(seed=how)}
    return autoshard.plan(made(case), mesh, *batch(*SIZES[0]), dynamic=dynamic, hardware=SLOW, **asked)


SMALL = ("mlp", "conv_net", "gpt")
QUICK = {("dp=2", "fsdp"), ("dp=2", 0), ("dp=2,tp=2", "megatron"), ("dp=2,tp=2", 1)}  # of the models that take long to plan
CROSS = [
    pytest.param(case, mesh, how, marks=() if case in SMALL or (mesh, how) in QUICK else pytest.mark.slow)
    for case in CASES
    for mesh in MESHES
    for how in ("ddp", "fsdp", "megatron", "megatron_sp", 0, 1)
]


@pytest.mark.parametrize(("case", "mesh", "how"), CROSS)
def test_one_plan_serves_all_sizes(case: str, mesh: str, how: str | int) -> None:
    plan = planned(case, mesh, how)
    for sizes in SIZES:
        verified = autoshard.verify(made(case), plan, *CASES[case][1](*sizes))
        assert verified.is_equal, f"{sizes}: {verified}"


@pytest.mark.hypothesis
@settings(max_examples=60)
@given(st.sampled_from(SMALL), st.sampled_from(MESHES), st.integers(0, 3), st.integers(2, 17), st.integers(2, 17))
def test_every_size_is_equal_or_refused(case: str, mesh: str, seed: int, batch: int, length: int) -> None:
    """Plans drawn at random, at any sizes: what divides is computed alike, what does not is refused with sizes that work."""
    plan = planned(case, mesh, seed)
    args = CASES[case][1](batch, length)
    asked = {name: {"batch": batch, "seq": length}[name] for name in plan.program.symbols}
    divides = not any(evaluate(str(size), asked) % ways for size, _, ways in split_sizes(plan.program))
    if divides:
        verified = autoshard.verify(made(case), plan, *args)
        assert verified.is_equal, verified
    else:
        with pytest.raises(InputError, match="does not divide over the"):
            autoshard.simulate(plan, made(case), *args)


@pytest.mark.parametrize("seed", range(6))
def test_coincidences_of_the_example_are_not_planned_for(seed: int) -> None:
    """At 4 x 8 this reshape could split 4 as a factor of 8; at other sizes it has no common factors."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.scale(x).reshape(x.shape[1], x.shape[0], 6).cumsum(2) * x.shape[0]

    model = Turned().double()
    options = autoshard.Options(seed=seed)
    plan = autoshard.plan(model, "a=2", (normal(4, 8, 6),), dynamic={"x": BOTH}, hardware=SLOW, options=options)
    for batch, length in ((4, 8), (8, 12), (10, 4), (2, 6)):
        assert autoshard.verify(model, plan, (normal(batch, length, 6),)).is_equal


class Windowed(nn.Module):
    """Attention in a window, which is causal attention as long as the window is not full."""

    def __init__(self, window: int = 8) -> None:
        super().__init__()
        self.window, self.qkv = window, nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, -1))
        at = torch.arange(x.shape[1], device=x.device)
        distance = at[:, None] - at[None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < self.window)).squeeze(1)


def test_tables_of_the_examples_size_are_not_kept() -> None:
    model = Windowed().double()
    plan = autoshard.plan(model, "dp=2", (normal(4, 8, 16),), dynamic={"x": BOTH}, hardware=SLOW, template="ddp")
    assert "def constants" not in plan.source()
    assert "is_causal=True" not in plan.source()
    assert autoshard.verify(model, plan, (normal(4, 20, 16),)).is_equal
    fixed = autoshard.plan(model, "dp=2", (normal(4, 8, 16),), dynamic="batch", hardware=SLOW, template="ddp")
    (attention,) = [line for line in fixed.source().splitlines() if "attention = " in line]
    assert "True" in attention, "at 8 it is causal"
    assert autoshard.verify(model, fixed, (normal(8, 8, 16),)).is_equal


class Numbers(nn.Module):
    """Uses sizes in every way that programs can say, and returns one."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        batch, length = x.shape[:2]
        mean = x.sum((0, 1)) * (1.0 / batch) / length
        shifted = x[:, 1:].sum(1) + x.new_ones(batch, 6) * batch**0.5 / (length - 1)
        return mean, torch.cat([shifted, shifted.new_zeros(batch, 6)], 1).view(batch * 2, 6).sum(0), batch * length


def test_numbers_that_follow_from_sizes() -> None:
    model = Numbers()
    plan = autoshard.plan(model, "a=2", (normal(4, 8, 6),), dynamic={"x": {0: "batch", 1: Dim("seq", min=3)}}, hardware=SLOW)
    for shape in ((4, 8, 6), (6, 12, 6), (8, 4, 6)):
        x = normal(*shape).requires_grad_()
        simulation = autoshard.simulate(plan, model, (x.detach(),))
        for found, wanted in zip(simulation.outputs[:2], model(x)[:2], strict=True):
            torch.testing.assert_close(found.values[0], wanted.detach())
        assert simulation.outputs[2] == shape[0] * shape[1]


def test_dropout_and_training_statistics_at_other_sizes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).double()
    plan = autoshard.plan(model, "dp=2", (normal(4, 8),), dynamic="batch", hardware=SLOW, template="ddp")
    for batch in (4, 10):
        assert autoshard.verify(model, plan, (normal(batch, 8),)).is_equal


# ------------------------------------------------------------------------------------------------- what the user writes


class Nested(nn.Module):
    def forward(self, x: Tensor, *more: Tensor, pair: dict[str, Any] | None = None, flag: bool = True, **rest: Tensor) -> Tensor:
        total = x.sum(1) + sum(y.sum(1) for y in more)
        for y in ([pair["a"], *pair["b"]] if pair else []) + list(rest.values()):
            total = total + y.sum(1)
        return total if flag else -total


@pytest.mark.parametrize(
    "dynamic",
    [
        "n",
        {"x": "n", "more[0]": {0: "n"}, "pair": {0: "n"}, "extra": "n"},
        {0: {-2: "n"}, "more[0]": "n", "pair": {"a": "n", "b": ["n", {0: "n"}]}, "extra": {-2: "n"}},
    ],
    ids=["a name", "by argument", "nested"],
)
def test_ways_to_name_dims(dynamic: Any) -> None:
    def call(n: int) -> tuple[tuple, dict]:
        return (normal(n, 3), normal(n, 4)), {
            "pair": {"a": normal(n, 3), "b": [normal(n, 5), normal(n, 2)]},
            "flag": False,
            "extra": normal(n, 7),
        }

    plan = autoshard.plan(Nested(), "a=2", *call(4), dynamic=dynamic, hardware=SLOW)
    assert list(plan.program.symbols) == ["n"]
    for n in (4, 6):
        assert autoshard.verify(Nested(), plan, *call(n)).is_equal


def expect(error: type[AutoshardError], text: str, model: nn.Module, args: tuple, dynamic: Any, mesh: str = "dp=2") -> None:
    with pytest.raises(error, match=text):
        autoshard.plan(model, mesh, args, dynamic=dynamic, hardware=SLOW)


WRONG: dict[str, tuple[Any, str]] = {
    "an unknown argument": ({"y": "batch"}, "dynamic names 'y', which is no argument of MLP; its arguments are x"),
    "a dim that is not there": ({"x": {2: "batch"}}, r"dynamic names dim 2 of x, which has shape \(4, 8\)"),
    "no name": ({"x": {0: 4}}, 'dynamic says 4 of a dim of x; give a name like "batch"'),
    "no dims": ({"x": 3}, "dynamic says 3 of x; write its dims and their names"),
    "neither name nor dict": (7, "dynamic is a name, or a dict"),
    "one name, two lengths": ({"x": {0: "n", 1: "n"}}, r"n is the name of one size, and this call has lengths \[4, 8\] there"),
    "two ranges": ({"x": {0: Dim("n", max=8), 1: "n"}}, "n is the name of one size"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_marks(case: str) -> None:
    dynamic, text = WRONG[case]
    expect(InputError, text, MLP().double(), (normal(4, 8),), dynamic)


@pytest.mark.parametrize("name", ["dp", "torch", "all_reduce", "a b", "class", "_x"])
def test_a_size_is_not_called_like_what_programs_use(name: str) -> None:
    expect(TraceError, "choose another name", MLP().double(), (normal(4, 8),), {"x": {0: name}} if name.isidentifier() else name)


def test_an_example_of_one() -> None:
    expect(InputError, "a dynamic size is 0 or 1 in the example", MLP().double(), (normal(1, 8),), "batch")


# ---------------------------------------------------------------------------------- models that fix a size, sizes that fail


def model_of(function: Callable[..., Any]) -> nn.Module:
    """A module whose forward is `function`."""
    return type("Model", (nn.Module,), {"forward": lambda self, x: function(x)})()


def branches(x: Tensor) -> Tensor:
    if x.shape[0] == 4:  # the line that fixes it
        return x + 1
    return x * 2


def converts(x: Tensor) -> Tensor:
    return x / float(x.shape[0])  # the line that converts


def is_short(x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] <= 16 else x  # the line that compares


def adds_four(x: Tensor) -> Tensor:
    return x + x.new_zeros(4, 8)  # the line that adds four rows


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (
            branches,
            r"it fixes batch at 4\n  at .*test_dynamic_shapes.py:\d+: if x.shape\[0\] == 4:  # the line that fixes it\n  Take the size",
        ),
        (converts, r"it fixes batch at 4\n  at .*the line that converts"),
        (adds_four, r"it fixes batch at 4\n  at .*the line that adds four rows"),
        (is_short, r"the line that compares\n  Give the range in dynamic, as torch.export.Dim: batch = Dim\('batch', max=16\)"),
    ],
)
def test_a_model_that_fixes_a_size(function: Callable, text: str) -> None:
    expect(TraceError, text, model_of(function), (normal(4, 8),), "batch")


def test_sizes_that_must_be_equal() -> None:
    class Add(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    expect(
        TraceError, "Give sizes that must be equal one name in dynamic: m = n", Add(), (normal(4, 8),) * 2, {"x": {0: "n"}, "y": {0: "m"}}
    )


def test_a_range_is_kept() -> None:
    model = model_of(is_short)
    plan = autoshard.plan(model, "dp=2", (normal(4, 8),), dynamic={"x": {0: Dim("batch", max=16)}}, hardware=SLOW)
    assert autoshard.verify(model, plan, (normal(16, 8),)).is_equal
    for batch in (1, 18):
        with pytest.raises(InputError, match=f"batch is {batch} as dim 0 of x; the traced model serves 2 to 16"):
            autoshard.verify(model, plan, (normal(batch, 8),))


def test_a_size_that_does_not_divide() -> None:
    plan = planned("gpt", "dp=2,tp=2", "ddp")
    for batch, advice in ((6, "4 or 8"), (3, "4")):
        with pytest.raises(InputError) as caught:
            autoshard.simulate(plan, made("gpt"), *CASES["gpt"][1](batch, 8))
        assert f"batch {batch} does not divide over the 4 ranks of axes dp, tp; use a multiple of 4 for batch, such as {advice}" in str(
            caught.value
        )
    with pytest.raises(InputError, match=r"batch is one size, and is 4 as dim 0 of ids and 8 as dim 0 of labels"):
        autoshard.simulate(plan, made("gpt"), (tokens(4, 8), tokens(8, 8)))


def test_a_program_that_fits_its_example_alone_is_refused_elsewhere() -> None:
    """A shape that lost its symbol is found by the checker, at the first size at which it is wrong."""
    plan = copy.deepcopy(autoshard.plan(Attention(16, 4, 0.0).double(), "dp=2", (normal(4, 8, 16),), dynamic={"x": BOTH}, hardware=SLOW))
    node = next(n for n in plan.program.nodes("op") if "reshape" in str(n.target))
    node.args = (node.args[0], [int(size) for size in node.args[1]])
    with pytest.raises(InputError, match=r"was made for batch = 4, seq = 8 and does not hold for batch = 8, seq = 8: .*asks for shape \["):
        autoshard.simulate(plan, Attention(16, 4, 0.0).double(), (normal(8, 8, 16),))


def test_an_instance_is_the_plan_that_would_be_made_there() -> None:
    """Local shapes and arguments of a plan at other sizes are those of the same layouts planned at these sizes."""
    model, axes = Attention(16, 4, 0.0).double(), {"template": "ddp", "hardware": SLOW}
    plan = autoshard.plan(model, "dp=2", (normal(4, 8, 16),), dynamic={"x": BOTH}, **axes)  # type: ignore[arg-type]
    fixed = autoshard.plan(model, "dp=2", (normal(8, 6, 16),), **axes)  # type: ignore[arg-type]
    there = instantiate(plan.program, {"batch": 8, "seq": 6})
    for mine, theirs in zip(there.graph.nodes, fixed.program.graph.nodes, strict=True):
        assert (mine.name, facts(mine).values, facts(mine).layouts) == (theirs.name, facts(theirs).values, facts(theirs).layouts)
        assert [a for a in mine.args if isinstance(a, list)] == [a for a in theirs.args if isinstance(a, list)]


# ------------------------------------------------------------------------------------------------------- text and files


def test_the_program_reads_well(golden: Callable[[str, str], None]) -> None:
    torch.manual_seed(0)
    plan = autoshard.plan(
        Attention(16, 4, 0.0), "dp=2,tp=2", (torch.zeros(4, 8, 16),), dynamic={"x": BOTH}, template="megatron", hardware=SLOW
    )
    golden("attention_dynamic_dp2_tp2.py", plan.source())


@pytest.mark.parametrize("case", ["gpt", "llama"])
def test_a_saved_plan_serves_all_sizes(case: str, tmp_path: Path) -> None:
    plan = planned(case, "dp=2,tp=2", "fsdp")
    plan.save(tmp_path / "plan.json")
    loaded = autoshard.Plan.load(tmp_path / "plan.json")
    assert loaded.source() == plan.source()
    assert loaded.program.symbols == plan.program.symbols
    for sizes in SIZES[:3]:
        assert autoshard.verify(made(case), loaded, *CASES[case][1](*sizes)).is_equal
    with pytest.raises(InputError, match="does not divide"):
        autoshard.simulate(loaded, made(case), *CASES[case][1](7, 8))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    planned("gpt", "dp=2", "ddp").save(path)
    return path.read_text()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('{"size": "batch // 2"}', '{"size": "__import__(\'os\')"}'),
        ('{"size": "batch // 2"}', '{"size": "batch.real"}'),
        ('{"size": "batch // 2"}', '{"size": "batch // 1"}'),
        ('{"size": "batch // 2"}', '{"size": "seq"}'),
        ('{"size": "batch"}', '{"size": 4}'),
        ('{"size": "batch"}', '{"size": "1/batch"}'),
        ('"name": "batch"', '"name": "dp"'),
        ('"name": "batch"', '"name": "x = 1; y"'),
        ('"example": 4', '"example": "4"'),
        ('"least": 2', '"least": 0'),
    ],
)
def test_an_altered_size_is_refused(text: str, old: str, new: str, tmp_path: Path) -> None:
    body = json.dumps({key: value for key, value in json.loads(text).items() if key != "sha256"})
    assert old in body
    changed = json.loads(body.replace(old, new))
    (tmp_path / "plan.json").write_text(json.dumps({"sha256": plan_file.digest(changed), **changed}))
    with pytest.raises(AutoshardError):
        autoshard.Plan.load(tmp_path / "plan.json")


def test_the_layouts_of_sizes_are_those_of_numbers() -> None:
    assert local_shape((Size(4, positive("batch")),), (R, I), MeshSpec(("a", "b"), (2, 2)).shape) == (4,)


# ------------------------------------------------------------------------------------------------------- real processes


def trains_on_changing_batches(mesh: DeviceMesh) -> None:
    """Five steps at four batch sizes and two lengths: one trace, one plan, the parameters of a single process."""
    model = made("gpt")
    alone = copy.deepcopy(model)
    with (
        mock.patch("torch.export.export", wraps=torch.export.export) as traces,
        mock.patch("autoshard.module.make_plan", wraps=planner.make_plan) as plans,
    ):
        compiled = autoshard.compile(model, mesh, template="fsdp", dynamic={"ids": BOTH, "labels": BOTH}, hardware=SLOW)
        optimizers = [torch.optim.AdamW(m.parameters(), 1e-2) for m in (compiled, alone)]
        for sizes in ((4, 8), (8, 8), (2, 16), (6, 8), (4, 8)):
            args, _ = CASES["gpt"][1](*sizes)
            losses = [m(*args) for m in (compiled, alone)]
            for loss, optimizer in zip(losses, optimizers, strict=True):
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            torch.testing.assert_close(*losses)
    assert (traces.call_count, plans.call_count) == (1, 1)
    for (name, mine), theirs in zip(compiled.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.full_tensor(), theirs, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def refuses_and_goes_on(mesh: DeviceMesh) -> None:
    """A batch that does not divide is refused on every rank; the next one runs. A batch of one is planned for by itself."""
    model = made("mlp")
    compiled = autoshard.compile(model, mesh, template="ddp", dynamic="batch", hardware=SLOW)
    torch.testing.assert_close(compiled(normal(4, 8)), model(normal(4, 8)))
    advice = "batch 7 does not divide over the 2 ranks of axis dp; use a multiple of 2 for batch, such as 6 or 8"
    with pytest.raises(InputError, match=advice):
        compiled(normal(7, 8))
    torch.testing.assert_close(compiled(normal(6, 8)), model(normal(6, 8)))
    whole = autoshard.compile(model, mesh, dynamic="batch", hardware=SLOW)
    torch.testing.assert_close(whole(normal(1, 8)), model(normal(1, 8)))
    assert not whole.plan.program.symbols
    torch.testing.assert_close(whole(normal(4, 8)), model(normal(4, 8)))
    assert list(whole.plan.program.symbols) == ["batch"]


def ranks_agree_on_sizes(mesh: DeviceMesh) -> None:
    compiled = autoshard.compile(made("mlp"), mesh, template="ddp", dynamic="batch", hardware=SLOW)
    compiled(normal(4, 8))
    rank = mesh.get_rank()
    with pytest.raises(InputError, match=r"ranks disagree on the shapes of arguments, .*\(6, 8\).*\(8, 8\)"):
        compiled(normal(6 + 2 * rank, 8))
    with pytest.raises(AutoshardError, match=r"batch 7 does not divide over the 2 ranks of axis dp"):
        compiled(normal(7 + 3 * rank, 8))
    torch.testing.assert_close(compiled(normal(12, 8)), made("mlp")(normal(12, 8)))


def takes_local_parts_and_gives_dtensors(mesh: DeviceMesh) -> None:
    compiled = autoshard.compile(made("mlp"), mesh, template="ddp", dynamic="batch", hardware=SLOW, inputs="local", outputs="dtensor")
    for batch in (2, 3, 5):
        whole = normal(2 * batch, 8)
        result = compiled(whole.chunk(2)[mesh.get_rank()])
        assert isinstance(result, DTensor)
        assert result.shape == (2 * batch, 8)
        torch.testing.assert_close(result.full_tensor(), made("mlp")(whole))
    assert len(compiled._state.ready) == 1


def serves_from_a_file(mesh: DeviceMesh) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plan = autoshard.plan(made("gpt"), mesh, *CASES["gpt"][1](4, 8), dynamic=CASES["gpt"][2], template="megatron", hardware=SLOW)
        plan.save(f"{folder}/plan.json")
        loaded = autoshard.Plan.load(f"{folder}/plan.json")
    with mock.patch("torch.export.export", side_effect=AssertionError("traced again")):
        compiled = loaded.apply(made("gpt"), mesh)
        for sizes in ((8, 16), (4, 8), (6, 4)):
            args, _ = CASES["gpt"][1](*sizes)
            torch.testing.assert_close(compiled(*args), made("gpt")(*args))


def run_checks(names: list[str]) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    for name in names:
        try:
            globals()[name](mesh)
        except Exception as error:
            error.add_note(f"in {name}")
            raise


CHECKS = [trains_on_changing_batches, refuses_and_goes_on, ranks_agree_on_sizes, takes_local_parts_and_gives_dtensors, serves_from_a_file]


def test_two_ranks() -> None:
    run_on_ranks(2, run_checks, [check.__name__ for check in CHECKS])
