"""What is counted while a program runs is what its plan says; ranges of modules are in its profile and change no result."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import autoshard
from autoshard.conversions import COMMUNICATES
from autoshard.debug import count_communication

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import gpt


def tokens(batch: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(gpt.SMALL.vocab, (batch, gpt.SMALL.block), generator=generator)


def predicted_calls(plan: autoshard.Plan) -> dict[tuple[str, str], int]:
    calls: Counter[tuple[str, str]] = Counter()
    for row in plan.cost.rows:
        if row.kind in COMMUNICATES and row.wire_bytes and row.is_per_step:
            calls[row.kind, row.axis] += row.times
    return dict(calls)


def count_steps(templates: list[Any]) -> list[tuple[dict, dict, dict, dict]]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    return [count_step(template, mesh) for template in templates]


def count_step(template: Any, mesh: Any) -> tuple[dict, dict, dict, dict]:
    torch.manual_seed(0)
    model = autoshard.compile(gpt.GPT(gpt.SMALL), mesh, template=template, hardware="h100")
    model(tokens(), tokens()).backward()
    with count_communication(mesh) as sent:
        model(tokens(), tokens()).backward()
    calls = {key: counted.calls for key, counted in sent.by_axis.items()}
    return calls, sent.sent_bytes, predicted_calls(model.plan), model.plan.stats["wire_bytes_per_step"]


def test_what_is_counted_is_what_the_plan_says() -> None:
    templates = ["ddp", "fsdp", "megatron", "megatron_sp"]
    for rank in run_on_ranks(2, count_steps, templates):
        for template, (calls, sent_bytes, predicted, predicted_bytes) in zip(templates, rank, strict=True):
            assert calls, template
            assert calls == predicted, template
            assert sent_bytes == pytest.approx(predicted_bytes), template


def count_pipeline() -> tuple[dict[str, int], dict[str, float], dict[str, float]]:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    cut = autoshard.Pipelining(microbatches=2, schedule="1f1b", starts=("blocks.1",))
    model = autoshard.compile(gpt.GPT(gpt.SMALL), mesh, pipeline=cut, hardware="h100")
    model(tokens(), labels=tokens()).backward()
    with count_communication(mesh) as sent:
        model(tokens(), labels=tokens()).backward()
    return sent.calls, sent.sent_bytes, model.plan.stats["wire_bytes_per_step"]


def test_stages_send_what_the_plan_says() -> None:
    (first, first_bytes, predicted), (last, last_bytes, _) = run_on_ranks(2, count_pipeline)
    assert max(first_bytes["send"], last_bytes["send"]) == predicted["send"]
    assert (first["send"], last["send"]) == (2, 2), "one value forward and its gradient back, for each microbatch"


def exchange_rows(rows: list[list[int]]) -> tuple[dict[str, int], dict[str, float]]:
    own = dist.get_rank()
    received = [part[own] for part in rows]
    with count_communication() as sent:
        dist.all_to_all_single(torch.zeros(sum(received), 4), torch.zeros(sum(rows[own]), 4), received, rows[own])
    return sent.calls, sent.sent_bytes


def test_an_exchange_counts_the_rows_that_leave() -> None:
    ranks = run_on_ranks(2, exchange_rows, [[3, 1], [2, 2]])
    assert ranks == [({"all_to_all": 1}, {"all_to_all": 1 * 16.0}), ({"all_to_all": 1}, {"all_to_all": 2 * 16.0})]
    ranks = run_on_ranks(2, exchange_rows, [[0, 3], [3, 0]])
    assert ranks == [({"rotate": 1}, {"rotate": 3 * 16.0})] * 2


class Recomputed(nn.Module):
    """An MLP under torch.utils.checkpoint, one in autocast, one behind torch.cond."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(lambda y: self.first(y).relu(), x, use_reentrant=False)
        with torch.autocast("cpu", torch.bfloat16):
            x = self.second(x)
        return torch.cond(x.sum() > 0, lambda y: self.third(y.float()), lambda y: y.float() * 2, (x,))


def profile_steps(kind: str) -> tuple[list[torch.Tensor], list[torch.Tensor], set[str], set[str]]:
    """Results and gradients without and with ranges, and the names in a profile of either."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    made, names = [], []
    for records in (False, True):
        torch.manual_seed(0)
        model: Any = gpt.GPT(gpt.SMALL) if kind == "gpt" else Recomputed()
        args = (tokens(), tokens()) if kind == "gpt" else (torch.randn(4, 8),)
        options = autoshard.Options(record_modules=records)
        template: Any = "fsdp" if kind == "gpt" else "auto"
        sharded = autoshard.compile(model, mesh, template=template, options=options, hardware="h100")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            result = sharded(*args)
            result.sum().backward()
        made.append([result.detach(), *(parameter.grad.to_local() for parameter in sharded.parameters())])
        names.append({event.key for event in profile.key_averages()})
    return made[0], made[1], names[0], names[1]


@pytest.mark.parametrize("kind", ["gpt", "recomputed"])
def test_ranges_of_modules_are_in_the_profile(kind: str) -> None:
    modules = {"blocks.0.attn.qkv", "blocks.1.mlp.down", "norm", "GPT"} if kind == "gpt" else {"first", "second", "Recomputed"}
    for plain, recorded, names, recorded_names in run_on_ranks(2, profile_steps, kind):
        assert modules <= recorded_names
        assert not modules & names
        assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))


def test_ranges_stand_around_each_module() -> None:
    plan = autoshard.plan(gpt.GPT(gpt.SMALL), "tp=2", (tokens(),), options=autoshard.Options(record_modules=True), template="megatron")
    lines = plan.source().splitlines()
    start = next(k for k, line in enumerate(lines) if 'with torch.profiler.record_function("blocks.0.mlp.up"):' in line)
    inside = lines[start + 1 : next(k for k in range(start + 1, len(lines)) if lines[k].lstrip().startswith("with "))]
    assert any("aten.linear" in line for line in inside)
    plain = autoshard.plan(gpt.GPT(gpt.SMALL), "tp=2", (tokens(),), template="megatron").source().splitlines()
    assert statements(lines) == statements(plain)


def statements(lines: list[str]) -> list[str]:
    """Without comments, ranges, and the places where variables are deleted."""
    plain = (line.partition("  # ")[0].strip() for line in lines)
    return [line for line in plain if line and not line.startswith(("del ", "#", "with torch.profiler."))]
