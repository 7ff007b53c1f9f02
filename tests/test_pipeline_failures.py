"""Failures of pipelines on real processes: every rank ends its step with the first error, and no rank waits for ever."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pipelines import Wrecked, assert_gradients, assert_same, chain, engine_of, gpipe, one_f_one_b, schedule_of, single_process
from processes import run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import autoshard
from autoshard.errors import StageError
from autoshard.runtime.pipeline_engine import EngineStage, PipelineEngine


def failures_of(kinds: str, stage_ranks: tuple[int, ...], name: str, hows: Sequence[str]) -> list[tuple[str, str]]:
    """Stage 1 fails in every way of `hows`, each followed by a step that is right; the errors that this rank saw, and their causes."""
    torch.set_default_dtype(torch.float64)
    microbatches, seen = 4, []
    reference, stages = chain(kinds, microbatches), chain(kinds, microbatches)
    metas, results = single_process(reference, microbatches)
    wrecked = Wrecked(stages[1], 2)
    engine = engine_of([stages[0], wrecked, *stages[2:]], metas, stage_ranks, microbatches)
    schedule, loss = schedule_of(name, stage_ranks, microbatches), len(results[0]) - 1
    for how in hows:
        wrecked.how = how.removeprefix("evaluate ")
        with pytest.raises(StageError) as caught:
            engine.evaluate() if how.startswith("evaluate") else engine.train(schedule, loss)
        seen.append((str(caught.value), repr(caught.value.__cause__)))
        wrecked.how = ""
        for stage in stages:
            stage.zero_grad()
        found = engine.train(schedule, loss)
        assert_same(found, results if stage_ranks[-1] == dist.get_rank() else [])
        assert_gradients(stages, reference, stage_ranks)
    return seen


EXPECTED = {
    "forward": ("forward of microbatch 2", "ValueError: a bad batch", "ValueError('a bad batch')"),
    "evaluate forward": ("forward of microbatch 2", "ValueError: a bad batch", "ValueError('a bad batch')"),
    "backward": ("backward of microbatch 2", "KeyError: 'no gradient today'", "KeyError('no gradient today')"),
    "fewer": ("forward of microbatch 2", "PlanError: stage 1 passes on other values than planned: 6 values instead of 7", "PlanError"),
    "unplanned": ("forward of microbatch 2", "value 3 needs a gradient, but none is planned to come back", "PlanError"),
    "smaller": ("forward of microbatch 2", "value 0 is f64[1, 3] instead of f64[4, 3]", "PlanError"),
}


@pytest.mark.parametrize(
    ("kinds", "stage_ranks", "name"), [("sme", (0, 1, 0), "1f1b"), ("smme", (0, 1, 2, 3), "gpipe"), ("smme", (0, 1, 1, 0), "split")]
)
def test_a_stage_that_raises_ends_the_step_everywhere_and_the_next_is_right(kinds: str, stage_ranks: tuple[int, ...], name: str) -> None:
    hows = list(EXPECTED)
    seen = run_on_ranks(max(stage_ranks) + 1, failures_of, kinds, stage_ranks, name, hows)
    for rank, errors in enumerate(seen):
        for how, (text, cause) in zip(hows, errors, strict=True):
            place, reason, original = EXPECTED[how]
            place = place.replace("backward", "backward of the inputs") if name == "split" else place
            assert text.startswith(f"stage 1, {place}, failed on rank 1: "), text
            assert reason in text
            assert cause.startswith(original) if rank == 1 else cause == "None"


def loses_a_rank(folder: str, lost: int, stage_ranks: tuple[int, ...]) -> None:
    """A rank dies in its forward of microbatch 1; the others write down what they were told, now and at the next step."""
    torch.set_default_dtype(torch.float64)
    kinds, microbatches = "s" + "m" * (len(stage_ranks) - 2) + "e", 3
    stages = chain(kinds, microbatches)
    metas, results = single_process(chain(kinds, microbatches), microbatches)

    class Dying(nn.Module):
        def forward(self, number: int, *values: Tensor) -> tuple[Tensor, ...]:
            if number == 1:
                os._exit(13)
            return stages[lost](number, *values)

    engine = engine_of([Dying() if rank == lost else stage for stage, rank in zip(stages, stage_ranks, strict=True)], metas, stage_ranks, 3)
    errors = []
    for _ in range(2):
        with pytest.raises(StageError) as caught:
            engine.train(one_f_one_b(stage_ranks, microbatches), len(results[0]) - 1)
        errors.append(str(caught.value))
    (Path(folder) / str(dist.get_rank())).write_text("\n".join(errors))
    os._exit(0)


def test_the_others_end_when_a_rank_dies(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"their exit codes: \{0: 0, 1: 13, 2: 0\}"):
        run_on_ranks(3, loses_a_rank, str(tmp_path), 1, (0, 1, 2))
    for rank in (0, 2):
        first, second = (tmp_path / str(rank)).read_text().split("\n", 1)
        assert "of microbatch" in first
        assert "on rank 1: " in first
        assert second.startswith("this pipeline stopped for good in an earlier step: ")


def waits_in_vain() -> str:
    """Rank 1 does not come to the step within the group's timeout; returns what rank 0 was told."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    store = dist.distributed_c10d._get_default_store()
    value = torch.empty(2, device="meta", requires_grad=True)
    forward = [lambda values, number: (torch.ones(2, requires_grad=True) * 2,), lambda values, number: (values[0].sum(),)]
    loss = torch.empty((), device="meta", requires_grad=True)
    own = EngineStage(dist.get_rank(), forward[dist.get_rank()], (value,) * dist.get_rank(), ((value,), (loss,))[dist.get_rank()])
    engine = PipelineEngine([own], (0, 1), 2, group, torch.device("cpu"))
    if dist.get_rank() == 1:
        store.wait(["rank 0 gave up"])
        return ""
    with pytest.raises(StageError) as caught:
        engine.train(gpipe((0, 1), 2), 0)
    store.set("rank 0 gave up", "yes")
    return str(caught.value)


def test_a_rank_that_does_not_answer_is_named_after_the_timeout() -> None:
    text = run_on_ranks(2, waits_in_vain)[0]
    assert text.startswith("stage 0 on rank 0 waited for the gradients of microbatch 0 from stage 1 on rank 1: ")


class Words(nn.Module):
    """An index beyond the table fails in the first stage, of the replica that has the row."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(8, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.out(torch.tanh(self.table(ids)))).sum()


def fails_in_one_replica() -> tuple[str, bool]:
    """What a rank is told, and whether the loss is the same before and after."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    model = autoshard.compile(Words(), mesh, template="ddp", pipeline=autoshard.Pipelining(2))
    ids, wrong = torch.arange(8), torch.arange(8)
    wrong[1] = 100
    before = float(model(ids).detach())
    with pytest.raises(StageError) as caught:
        model(wrong)
    return str(caught.value), float(model(ids).detach()) == before


def test_a_failure_of_one_replica_ends_the_step_of_all() -> None:
    for text, is_unharmed in run_on_ranks(4, fails_in_one_replica):
        assert text.startswith("stage 0, forward of microbatch 0, failed on rank 0: IndexError: index out of range")
        assert is_unharmed
