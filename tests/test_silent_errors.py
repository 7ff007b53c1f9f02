"""Errors that partitioners are known to make without a word: each model here trains the same on all ranks as on one device.

Every model goes through the public path under the templates that fit and plans drawn at random, on one axis and on two, and
the oracle also compares input gradients and optimizer steps under programs whose every node draws its own strategy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training_oracle import Case

import autoshard
from autoshard.errors import TraceError
from autoshard.program import facts

BATCH, LENGTH, WIDTH, CLASSES = 4, 6, 12, 8
TEMPLATES = ("auto", "ddp", "fsdp", "megatron", "megatron_sp")
MESHES = ("a=2", "a=2,b=2")
_generator = torch.Generator().manual_seed(0)


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=_generator)


def numbers(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=_generator)


class Written(nn.Module):
    """A model that a function writes, with the parameters that it names."""

    def __init__(self, function: Callable[..., Any], **shapes: Sequence[int]) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(real(*shape) / max(shape[-1] if shape else 1, 1) ** 0.5))

    def forward(self, **arguments: Tensor) -> Any:
        return self.function(self, **arguments)


def prove(
    model: nn.Module, arguments: Mapping[str, Tensor], templates: Sequence[str] = TEMPLATES, meshes: Sequence[str] = MESHES, seeds: int = 3
) -> set[str]:
    """Raise unless the model is equal on all ranks under every plan; returns the ops some plan of which splits something."""
    model, split = model.double(), set[str]()
    for mesh in meshes:
        choices: list[dict[str, Any]] = [{"template": template} for template in templates]
        choices += [{"options": autoshard.Options(seed=seed)} for seed in range(seeds)]
        for choice in choices:
            plan = autoshard.plan(model, mesh, (), arguments, **choice)
            found = autoshard.verify(model, plan, (), arguments)
            assert found.is_equal, f"{choice} on {mesh}: {found}"
            split |= split_ops(plan.program)
    case = Case.of(model, {name: x.requires_grad_() if x.dtype == torch.float64 and x.is_leaf else x for name, x in arguments.items()})
    for seed in range(2 * seeds):
        program = case.plan(MESHES[seed % 2], seed, is_scattered=True)
        case.prove(program, is_text=seed % 3 == 0)
        split |= split_ops(program)
    return split


def split_ops(program: Any) -> set[str]:
    """Names of ops that the program splits, without namespace and overload."""
    found = [node for node in program.nodes("op") if any(strategy.factor for strategy in facts(node).strategies)]
    return {str(facts(node).op or node.target).split(".")[1] for node in found}


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize(("groups", "stride", "padding"), [(1, 1, 1), (1, 2, 0), (3, 1, 1)])
def test_convolution_backward_where_batch_or_space_is_split(groups: int, stride: int, padding: int) -> None:
    """The weight's gradient is a sum over batch and space; the input's needs what lies beyond the piece."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.conv2d(x, m.w, m.b, stride=stride, padding=padding, groups=groups)
        return F.conv2d(y.relu(), m.v, padding=1).square().mean()

    model = Written(forward, w=(6, 6 // groups, 3, 3), b=(6,), v=(4, 6, 3, 3))
    split = prove(model, {"x": real(BATCH, 6, 8, 8)}, ("auto", "ddp", "fsdp", "megatron"))
    assert "conv2d" in split


def test_transposed_convolution_backward() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, m.w, m.b, stride=2, padding=1).square().mean((2, 3))

    prove(Written(forward, w=(6, 4, 4, 4), b=(4,)), {"x": real(BATCH, 6, 4, 4)}, ("auto", "ddp", "fsdp"))


def test_bias_under_a_split_contraction() -> None:
    """Added on every rank it would count twice."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, CLASSES)).double()
    case = {"input": real(BATCH, WIDTH)}
    for mesh, text in (("a=2", "S(1)@a"), ("a=2,b=2", "S(1)@a S(1)@b"), ("a=2,b=2", "S(1)@b")):
        for bias in ("I", "S(0)@a"):
            plan = autoshard.plan(model, mesh, (), case, constraints={"2.weight": text, "2.bias": bias, "0.weight": "S(0)@a"})
            assert autoshard.verify(model, plan, (), case).is_equal
    assert "linear" in prove(model, case)


def test_tied_weights_sum_their_gradients() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(CLASSES, WIDTH)
            self.up, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES, bias=False)
            self.head.weight = self.table.weight
            self.again = nn.ParameterList([self.up.weight])

        def forward(self, ids: Tensor, target: Tensor) -> Tensor:
            h = self.up(self.table(ids)).relu() @ self.again[0].t()
            return F.cross_entropy(self.head(h).flatten(0, 1), target.flatten())

    ids, target = numbers(CLASSES, BATCH, LENGTH), numbers(CLASSES, BATCH, LENGTH)
    split = prove(Tied(), {"ids": ids, "target": target})
    assert {"linear", "embedding"} <= split


def test_one_parameter_on_a_split_and_a_whole_path() -> None:
    """Its gradient is a sum over ranks from one use and the whole from the other."""

    def forward(m: Any, x: Tensor, c: Tensor) -> Tensor:
        return (x @ m.w).square().mean() + (c @ m.w).square().sum() + m.w.norm()

    prove(Written(forward, w=(WIDTH, WIDTH)), {"x": real(BATCH, WIDTH), "c": real(5, WIDTH)}, ("auto", "fsdp"))


# --------------------------------------------------------------------------------------------------------------- losses


def test_class_split_loss_beside_an_unrelated_log_softmax() -> None:
    """A rewrite of log_softmax for split classes must not touch another one, of other logits or of the same."""

    def forward(m: Any, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = x @ m.head
        gate = F.log_softmax(x @ m.gate, dim=-1)
        same = F.log_softmax(logits, dim=0)
        return F.cross_entropy(logits, target) + gate.exp().square().sum() + same.mean(), gate

    model = Written(forward, head=(WIDTH, CLASSES), gate=(WIDTH, CLASSES))
    split = prove(model, {"x": real(CLASSES, WIDTH), "target": numbers(CLASSES, CLASSES)}, seeds=5)
    assert {"cross_entropy_loss", "log_softmax"} <= split


def test_mean_loss_with_ignored_targets() -> None:
    """The mean of the ranks' means is another number where ranks ignore unequally many."""

    def forward(m: Any, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(x @ m.w, target, ignore_index=0)

    target = torch.tensor([0, 0, 0, 3, 4, 5, 1, 2])
    assert "cross_entropy_loss" in prove(Written(forward, w=(WIDTH, CLASSES)), {"x": real(8, WIDTH), "target": target})


def test_loss_divided_by_the_batch_that_the_model_saw() -> None:
    """`x.shape[0]` is a number in the trace: the global batch, also on a rank that has a part of it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = x @ m.w
        return y.square().sum() / x.shape[0] + y.sum() / y.numel() + y.view(x.shape[0], -1).std(0).mean()

    prove(Written(forward, w=(WIDTH, WIDTH)), {"x": real(BATCH, WIDTH)})


def test_norm_and_clip_of_a_value_that_is_split_or_partial() -> None:
    """No sum of norms is the norm of the sum."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = x @ m.w
        scale = (1.0 / (y.norm() + 1e-6)).clamp(max=1.0)
        return (y * scale).relu().sum() + y.max() + y.abs().amax(0).sum()

    prove(Written(forward, w=(WIDTH, WIDTH)), {"x": real(BATCH, WIDTH)})


# --------------------------------------------------------------------------------------------------- views and positions


@pytest.mark.parametrize("shape", [(4, 6, 3, 4), (24, 12), (4, 72), (2, 2, 6, 12), (8, 3, 12), (288,)])
def test_view_of_a_tensor_split_on_an_inner_dim(shape: tuple[int, ...]) -> None:
    """A rank's piece has other elements in other places; the same view of it may be of other elements."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = (x @ m.w).view(shape) * m.scale.expand(shape)
        return y.square().flatten(-1).sum(-1), y.reshape(4, 6, 12).transpose(1, 2).reshape(4, -1)

    model = Written(forward, w=(WIDTH, WIDTH), scale=(1,))
    prove(model, {"x": real(4, 6, WIDTH)}, ("auto", "ddp", "fsdp"))


def test_batch_literal_in_arange_and_index() -> None:
    """arange(B) then an index by it: with the batch split, a rank's own rows begin elsewhere."""

    def forward(m: Any, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, _ = x.shape
        y = x @ m.w
        rows, places = torch.arange(batch), torch.arange(length)
        mask = (y.sum(-1) > 0)[rows[:, None], places[None, :]]
        pooled = y[rows, last]
        return (y * mask[..., None]).sum((1, 2)), pooled * (rows[:, None] + 1)

    prove(Written(forward, w=(WIDTH, WIDTH)), {"x": real(BATCH, LENGTH, WIDTH), "last": numbers(LENGTH, BATCH)}, seeds=5)


def test_index_with_a_mask_of_batch_and_place() -> None:
    """mask[arange_B, arange_S], as attention masks are looked up."""

    def forward(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        rows = torch.arange(x.shape[0])[:, None, None]
        kept = mask[rows, torch.arange(LENGTH)[None, None, :]]
        scores = (x @ m.w @ x.mT).masked_fill(~kept.expand(-1, LENGTH, -1), -1e9)
        return scores.softmax(-1) @ x

    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True] * 2 + [False] * 4, [True] + [False] * 5])
    prove(Written(forward, w=(WIDTH, WIDTH)), {"x": real(BATCH, LENGTH, WIDTH), "mask": mask}, seeds=5)


@pytest.mark.parametrize("is_accumulated", [False, True])
def test_index_put_whose_operands_lie_unlike(is_accumulated: bool) -> None:
    """The written value is split, what it is written to is not: a conversion must stand between them."""

    def forward(m: Any, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ m.w
        written = (m.base * 2).index_put((rows,), y, accumulate=is_accumulated)
        places = m.base.index_put((rows[:, None], torch.arange(1, 3)), y[:, 1:3], accumulate=is_accumulated)
        return written.square().mean(), places.sum(1)

    model = Written(forward, w=(WIDTH, WIDTH), base=(8, WIDTH))
    rows = torch.tensor([1, 6, 6, 3]) if is_accumulated else torch.tensor([1, 6, 2, 3])
    prove(model, {"x": real(BATCH, WIDTH), "rows": rows})


def test_scatter_and_index_add() -> None:
    def forward(m: Any, x: Tensor, rows: Tensor) -> Tensor:
        y = x @ m.w
        counted = torch.zeros(8, WIDTH, dtype=x.dtype).index_add(0, rows, y)
        spread = torch.zeros(BATCH, 8, dtype=x.dtype).scatter(1, rows[:, None], y[:, :1])
        return counted.square().sum() + (spread.cumsum(0) * y[:, :8]).sum()

    prove(Written(forward, w=(WIDTH, WIDTH)), {"x": real(BATCH, WIDTH), "rows": torch.tensor([1, 6, 6, 3])})


def order_along_the_batch(m, x):
    y = x @ m.w
    return y.flip(0) * y, y.roll(1, 0), y.cumsum(0), y.sort(0).values, y.argmax(0), y[::2], y[1:3], y[-1], y.diff(dim=0)


def order_along_the_width(m, x):
    y = x @ m.w
    return y.flip(1) * y, y.roll(2, 1), y.cumsum(1), y.topk(3, 1).values, y.argmax(1), y[:, 1::3], y[:, 3], y.chunk(5, 1), y.tril()


@pytest.mark.parametrize("function", [order_along_the_batch, order_along_the_width], ids=lambda f: f.__name__)
def test_ops_that_depend_on_the_order(function: Any) -> None:
    prove(Written(function, w=(WIDTH, WIDTH)), {"x": real(BATCH, WIDTH)}, ("auto", "ddp", "fsdp"))


def test_cat_with_an_empty_tensor_of_one_dim() -> None:
    """torch passes over empty tensors of one dim, as caches begin with; they have none of the result's dims."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.cat([torch.empty(0, dtype=x.dtype), x @ m.w], dim=-1)

    prove(Written(forward, w=(WIDTH, WIDTH)), {"x": real(BATCH, WIDTH)}, ("auto", "ddp"))


# --------------------------------------------------------------------------------------------------------------- states


def test_batch_statistics_of_a_split_batch() -> None:
    """Each rank's own mean and variance are others, and so are the tracked ones."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))
    assert "batch_norm" in prove(model, {"input": real(8, WIDTH)})


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
def test_norm_of_one_sample_whose_gradient_is_transposed(norm: Callable[..., nn.Module], is_training: bool) -> None:
    """torch's CPU kernel misreads such a gradient: a batch that is split until one sample is left must not run into it."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 1), norm(4, affine=True), nn.Linear(64, CLASSES)

        def forward(self, input: Tensor) -> Tensor:
            tokens = self.norm(self.conv(input)).flatten(2).transpose(1, 2)
            return self.head(tokens.sin().flatten(1))

    model = Tokens().double().train(is_training)
    x = real(BATCH, 3, 4, 4)
    for mesh in ("a=4", "a=2,b=2"):
        plan = autoshard.plan(model, mesh, (x,), template="ddp")
        assert autoshard.verify(model, plan, (x,)).is_equal
    prove(model, {"input": x})


def doubles_columns(y):
    y[:, :3] *= 2


def adds_to_a_row(y):
    y[1].add_(1)


def clears_what_another_view_shows(y):
    y.t()[0] = 0


@pytest.mark.parametrize("write", [doubles_columns, adds_to_a_row, clears_what_another_view_shows], ids=lambda f: f.__name__)
def test_writes_into_a_part_of_a_value_are_equal_or_refused(write: Callable[[Tensor], None]) -> None:
    """Silently lost, or done to a rank's own part of the part, they would be wrong."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = x @ m.w
        write(y)
        return y.square().sum(1)

    refusal = ""
    try:
        prove(Written(forward, w=(WIDTH, WIDTH)), {"x": real(BATCH, WIDTH)}, ("auto", "ddp", "fsdp"))
    except TraceError as error:
        refusal = str(error)
    what = r"aten.*(writes into memory that .* reads later|has no functional form), at test_silent_errors.py:\d+ .*"
    assert not refusal or re.fullmatch(f"{what}; write the model without this in-place op", refusal)
