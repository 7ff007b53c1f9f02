"""Input that is legal but awkward: sizes that nothing divides, empty and scalar tensors, strides, aliases, small dtypes.

Each goes through the public path; what cannot be partitioned is whole and correct, or one clear error.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import run_on_ranks
from test_silent_errors import MESHES, TEMPLATES, Written, numbers, prove, real
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import autoshard
from autoshard.errors import InputError, RuleError
from autoshard.rules import RULES, Rule
from autoshard.testing import check_rule

WIDTH = 12


def dense(m: Any, x: Tensor) -> Tensor:
    """The plainest model."""
    return (x @ m.w).relu().square().sum(-1)


# ---------------------------------------------------------------------------------------------------------------- sizes


def test_sizes_that_no_axis_divides() -> None:
    """Everything is 5 or 3 long, too short to be padded: nothing is split, and the results are right."""
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 5), nn.LayerNorm(5))
    assert not prove(model, {"input": real(3, 5)}, ("auto",))


@pytest.mark.parametrize("template", ["ddp", "fsdp"])
def test_a_batch_that_no_axis_divides_is_refused(template: Any) -> None:
    for mesh in MESHES:
        text = rf"template '{template}' splits dim 0 of the arguments, of length 7, in [24] on ax.* which does not divide; use a batch of"
        with pytest.raises(InputError, match=text):
            autoshard.plan(Written(dense, w=(12, 12)).double(), mesh, (), {"x": real(7, 12)}, template=template)


@pytest.mark.parametrize("width", [5, 7, 13])
def test_an_uneven_dim_beside_even_ones(width: int) -> None:
    """It may be padded or stay whole, but what is gathered from it has neither gaps nor doubles."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = (x @ m.w).relu()
        return (y @ m.v).softmax(-1), y.cumsum(-1), torch.cat([y, y], -1)

    prove(Written(forward, w=(WIDTH, width), v=(width, WIDTH)), {"x": real(4, WIDTH)})


def test_an_axis_longer_than_every_dim() -> None:
    prove(Written(dense, w=(4, 6)), {"x": real(2, 4)}, ("auto",), meshes=("a=16", "a=1,b=5"), seeds=2)


# ------------------------------------------------------------------------------------------------------ empty and scalar


@pytest.mark.parametrize("shape", [(0, WIDTH), (4, 0, WIDTH)], ids=str)
def test_an_empty_batch(shape: tuple[int, ...]) -> None:
    prove(Written(dense, w=(WIDTH, WIDTH)), {"x": real(*shape)}, ("auto",))


def test_an_empty_piece_between_others() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = x @ m.w
        left, empty, right = y.split([6, 0, 6], -1)
        return torch.cat([right, empty, left], -1).square().sum(), empty.sum()

    prove(Written(forward, w=(WIDTH, WIDTH)), {"x": real(4, WIDTH)}, ("auto", "fsdp"))


def test_scalars_as_inputs_parameters_and_results() -> None:
    def forward(m: Any, x: Tensor, scale: Tensor, count: Tensor) -> tuple[Tensor, ...]:
        y = x @ m.w * m.temperature.exp() + scale
        return y.mean(), y.sum() / count, m.temperature * 2, y.max() * scale

    arguments = {"x": real(4, WIDTH), "scale": real(), "count": torch.tensor(3)}
    prove(Written(forward, w=(WIDTH, WIDTH), temperature=()), arguments)


# ---------------------------------------------------------------------------------------------------- strides and aliases

STRIDED = {
    "transposed": real(WIDTH, 4).t(),
    "every second column": real(4, 2 * WIDTH)[:, ::2],
    "expanded over the batch": real(1, WIDTH).expand(4, WIDTH),
    "expanded over both": real().expand(4, WIDTH),
    "offset": real(9, WIDTH)[3:7],
    "overlapping windows": real(15).unfold(0, WIDTH, 1),
}


@pytest.mark.parametrize("x", STRIDED.values(), ids=STRIDED)
def test_inputs_that_are_not_contiguous(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return (x @ m.w).relu().reshape(2, -1).cumsum(1), x.reshape(-1, 6).sum(0), x.t() @ x

    prove(Written(forward, w=(WIDTH, WIDTH)), {"x": x})


@pytest.mark.parametrize("kind", ["transposed", "expanded", "channels last"])
def test_parameters_that_are_not_contiguous(kind: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.conv2d(x, m.w).relu().mean((2, 3))

    model = Written(forward, w=(6, 4, 1, 1)).double()
    laid = {
        "transposed": model.w.detach().transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": real(6, 1, 1, 1).expand(6, 4, 1, 1),
        "channels last": model.w.detach().contiguous(memory_format=torch.channels_last),
    }
    model.w = nn.Parameter(laid[kind])
    arguments = {"x": real(4, 4, 2, 2)}
    for mesh in MESHES:
        for template in TEMPLATES[:4]:
            plan = autoshard.plan(model, mesh, (), arguments, template=template)  # type: ignore[arg-type]
            assert autoshard.verify(model, plan, (), arguments).is_equal


@pytest.mark.parametrize("is_whole", [True, False])
def test_inputs_that_share_memory(is_whole: bool) -> None:
    """One tensor passed twice, and two views of one: their gradients are two."""

    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return (x @ m.w * y).sum(1) + (y @ m.w.t()).square().mean()

    base = real(8, WIDTH)
    arguments = {"x": base, "y": base} if is_whole else {"x": base[:4], "y": base[3:7]}
    prove(Written(forward, w=(WIDTH, WIDTH)), arguments)


def test_writing_into_an_input_is_refused() -> None:
    """The caller's tensor would change on one device, and a rank's copy of it here."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x.mul_(2)
        return x @ m.w

    with pytest.raises(autoshard.AutoshardError, match=r"writes into the argument x, at .*test_bad_input.py:\d+  x.mul_\(2\)"):
        autoshard.plan(Written(forward, w=(WIDTH, WIDTH)).double(), "a=2", (), {"x": real(4, WIDTH)})


def test_results_that_share_memory() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        y = x @ m.w
        return y, y.t(), y[1:3], y.view(2, -1), x, x[0], m.w

    prove(Written(forward, w=(WIDTH, WIDTH)), {"x": real(4, WIDTH)})


# --------------------------------------------------------------------------------------------------------------- dtypes


def crossing(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Bools and small integers that ranks hold in parts, and ops along the split dim that need them whole."""
    y = x @ m.w
    positive, small = y > 0, (y.abs() * 10).clamp(max=200).to(torch.uint8)
    return (
        positive.any(0), positive.all(1), positive.cumsum(0), positive.flip(0), positive.sum(),
        small.cumsum(0), small.flip(1), small.sum(0), small.amax(0), small,
        positive.to(torch.int8).sum(0), (small > 3).any(), positive.t() & positive.t().flip(0), y * positive,
    )  # fmt: skip


def test_bools_and_bytes_that_cross_ranks() -> None:
    prove(Written(crossing, w=(WIDTH, WIDTH)), {"x": real(4, WIDTH)}, seeds=6)


def given_as_parts(m: Any, mask: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """A mask that arrives split and is read along the batch."""
    return (x @ m.w).masked_fill(mask.flip(0), 0.0).sum(0), mask.double().mean()


def test_a_bool_input_that_is_given_split() -> None:
    arguments = {"mask": numbers(2, 4, WIDTH).bool(), "x": real(4, WIDTH)}
    prove(Written(given_as_parts, w=(WIDTH, WIDTH)), arguments, ("auto", "ddp", "fsdp"), seeds=6)


def on_two_ranks() -> dict[str, float]:
    """The same over gloo, where collectives refuse some dtypes."""
    mesh, found = init_device_mesh("cpu", (2,), mesh_dim_names=("a",)), {}
    for template in ("auto", "ddp", "fsdp", "megatron"):
        torch.manual_seed(0)
        model = Written(crossing, w=(WIDTH, WIDTH)).double()
        with torch.no_grad():
            model.w.copy_(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3)))
        x = torch.randn(4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        expected = model(x=x)
        results = autoshard.compile(model, mesh, template=template)(x=x)  # type: ignore[arg-type]
        pairs = zip(expected, results, strict=True)
        found[template] = max(float((a.double() - b.double()).abs().max()) if a.dtype == b.dtype else torch.inf for a, b in pairs)
    return found


def test_bools_and_bytes_that_cross_processes() -> None:
    for found in run_on_ranks(2, on_two_ranks):
        assert max(found.values()) < 1e-12, found


# ---------------------------------------------------------------------------------------------------------- check_rule


def test_check_rule_tells_what_the_row_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "aten.mm.default", Rule("~m k, ~k n -> m"))
    with pytest.raises(RuleError, match=r"rule '~m k, ~k n -> m' does not fit a tensor of shape \(4, 8\)"):
        check_rule("aten::mm", real(4, 6), real(6, 8))


@pytest.mark.parametrize("sizes", [(5, 7), (0, 6), (1, 1)], ids=str)
def test_check_rule_on_sizes_that_leave_nothing_to_split(sizes: tuple[int, int]) -> None:
    proved = check_rule("aten::mm", real(*sizes), real(sizes[1], 3))
    assert {strategy.factor for (strategy,) in proved} <= {"", "k"}


def test_check_rule_on_strided_and_shared_operands() -> None:
    x = real(6, 6)
    for args in ((x, x), (x.t(), x), (x[:, ::2], x.t()[::2]), (real().expand(6, 6), x)):
        assert len(check_rule("aten::mm", *args)) >= 5
