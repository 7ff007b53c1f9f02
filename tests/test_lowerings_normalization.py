"""Lowerings of normalisation: what they send, running statistics, half types; and models of them under random plans."""

from collections import Counter

import pytest
import torch
from precision import check_precision
from test_lowerings import MESH, run, x
from torch import Tensor, nn
from torch.nn import Buffer
from torch.nn import functional as F
from training_oracle import Case

from autoshard.placements import R, S
from autoshard.testing import OpCase, check_rule

aten = torch.ops.aten

# An op on 8 samples, what is split on both axes, and what crosses each axis, forward and backward: two sums of each group.
SENT = {
    "layer_norm": (aten.layer_norm.default, (x(8, 16), [16], x(16), x(16)), "n0", {("all_reduce", 8): 8}),
    "rms_norm": (aten.rms_norm.default, (x(8, 16), [16], x(16)), "n0", {("all_reduce", 8): 4}),
    "channels of a group": (aten.group_norm.default, (x(8, 16, 4), 2, x(16), x(16)), "c", {("all_reduce", 16): 8}),
    "space": (aten.group_norm.default, (x(8, 16, 4), 2, x(16), x(16)), "s.0", {("all_reduce", 16): 8}),
    "groups": (aten.group_norm.default, (x(8, 16, 4), 4, x(16), x(16)), "g", {}),
    "samples": (aten.group_norm.default, (x(8, 16, 4), 4, x(16), x(16)), "b", {}),
    "instance_norm": (aten.instance_norm.default, (x(8, 2, 4), *[None] * 4, True, 0.1, 1e-5, False), "s.0", {("all_reduce", 16): 8}),
}


@pytest.mark.parametrize(("op", "args", "factor", "sent"), SENT.values(), ids=SENT)
def test_statistics_alone_cross_the_axes(op: torch._ops.OpOverload, args: tuple, factor: str, sent: dict, wire: list) -> None:
    run(OpCase(op, args, {}, MESH), factor, factor)
    assert Counter(wire) == sent


def test_channels_of_groups_are_cut_in_segments() -> None:
    """Every rank holds channels of every group; of many groups that would be many segments, and is not offered."""
    case = OpCase(aten.group_norm.default, (x(2, 16, 3), 4, x(16), x(16)), {}, MESH)
    assert run(case, "c", "c")[1] == (S(1, (4,) * 4), S(1, (4,) * 4))
    assert run(case, "g", "c")[1] == (S(1), S(1, (4,) * 4))
    assert not any(strategy.factor == "c" for (strategy,) in check_rule(aten.group_norm.default, x(2, 32, 3), 8))


def test_statistics_are_results() -> None:
    case = OpCase(aten.native_layer_norm.default, (x(8, 12), [12], x(12), x(12), 1e-5), {}, MESH)
    candidate = next(c for c in case.candidates({}) if [s.factor for s in c.strategies] == ["n0", "n0"])
    assert candidate.outputs == ((S(1), S(1)), (R, R), (R, R))


def test_written_statistics_of_instances_stay_whole() -> None:
    args = (x(4, 6, 8), None, None, Buffer(x(6)), Buffer(x(6).abs()), True, 0.1, 1e-5, False)
    assert {strategy.factor for (strategy,) in check_rule(aten.instance_norm.default, *args)} == {""}


PRECISE = {
    "layer_norm": (aten.layer_norm.default, (3 + x(16, 256), [256], x(256), x(256))),
    "rms_norm": (aten.rms_norm.default, (x(16, 256), [256], x(256))),
    "group_norm": (aten.group_norm.default, (3 + x(4, 16, 16), 4, x(16), x(16))),
    "instance_norm": (aten.instance_norm.default, (3 + x(4, 8, 64), x(8), x(8), None, None, True, 0.1, 1e-5, False)),
    "batch_norm": (aten.batch_norm.default, (3 + x(64, 8), x(8), x(8), None, None, True, 0.1, 1e-5, False)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("op", "args"), PRECISE.values(), ids=PRECISE)
def test_half_types(op: torch._ops.OpOverload, args: tuple, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(check_precision(monkeypatch, op, dtype, *args)) >= 2


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.group = nn.Conv1d(4, 12, 1), nn.GroupNorm(3, 12)
        self.instance, self.tracked = nn.InstanceNorm1d(12, affine=True), nn.InstanceNorm1d(12, track_running_stats=True)
        self.layer, self.rms, self.out = nn.LayerNorm(12), nn.RMSNorm(12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.tracked(F.relu(self.instance(self.group(self.conv(x))))).transpose(1, 2)
        return self.rms(self.out(self.layer(y)))


class Reduced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k = F.normalize(self.q(x), dim=-1), self.k(x)
        weights = (q @ k.transpose(-2, -1)).softmax(-1).cumsum(-2)
        variance, mean = torch.var_mean(weights @ k, -1, keepdim=True)
        best = (k * variance + mean).max(-1)
        some = torch.where(best.indices > 3, best.values, k.amin(-1)).logsumexp(-1)
        loss = F.mse_loss(some, F.cosine_similarity(q, k, dim=-1).std(-1)) + F.smooth_l1_loss(q, k, reduction="sum")
        return loss + F.binary_cross_entropy_with_logits(k, q.sigmoid()), best.indices, (k > 0).any(-1)


@pytest.mark.parametrize("mesh", ["a=2", "a=3", "a=2,b=2"])
@pytest.mark.parametrize(("model", "shape"), [(Normalised, (4, 4, 12)), (Reduced, (4, 12, 12))])
def test_models_under_random_plans(model: type[nn.Module], shape: tuple[int, ...], mesh: str) -> None:
    torch.manual_seed(0)
    case = Case.of(model().double(), {"x": torch.randn(shape, dtype=torch.float64)})
    lowered: set[str] = set()
    for seed in range(5):
        program = case.plan(mesh, seed, "whole", {}, is_scattered=seed > 0)
        lowered |= {node.target.__name__ for node in program.nodes("op") if node.target.__module__.startswith("autoshard.runtime")}
        case.prove(program, is_text=seed == 2)
    assert lowered
