"""Emitted folders of plans with pipeline stages run under torchrun by themselves, equal to those without stages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from models import EXAMPLES
from test_launcher import run

import autoshard
from autoshard.errors import PlanError


def emitted(folder: Path, example: str, mesh: str, how: autoshard.Pipelining | None = None, template: str = "auto") -> autoshard.Plan:
    args, kwargs = EXAMPLES[example].batch(0)
    plan = autoshard.plan(EXAMPLES[example].model(), mesh, args, kwargs, template=template, hardware="h100", pipeline=how)  # type: ignore[arg-type]
    plan.emit(folder)
    return plan


def losses(output: str) -> list[tuple[float, float]]:
    """Of every step that a launcher printed, the loss and the norm of all gradients."""
    found = re.findall(r"step \d+: loss (\S+?),.*gradient norm (\S+),", output)
    return [(float(loss), float(norm)) for loss, norm in found]


@pytest.mark.parametrize(
    ("example", "mesh", "how"),
    [
        ("gpt", "pp=2", autoshard.Pipelining(microbatches=4, schedule="1f1b")),
        pytest.param("hf_llama", "pp=2", autoshard.Pipelining(microbatches=2, schedule="zbv"), marks=pytest.mark.slow),
        pytest.param("gpt", "pp=2,tp=2", autoshard.Pipelining(microbatches=2, schedule="interleaved_1f1b"), marks=pytest.mark.slow),
        pytest.param("encoder", "dp=2,pp=2", autoshard.Pipelining(microbatches=2, schedule="gpipe"), marks=pytest.mark.slow),
    ],
)
def test_equal_to_the_plan_without_stages(example: str, mesh: str, how: autoshard.Pipelining, tmp_path: Path) -> None:
    plan = emitted(tmp_path / "stages", example, mesh, how, "megatron" if "tp" in mesh else "auto")
    emitted(tmp_path / "whole", example, "tp=2")
    assert plan.program.pipeline is not None
    stages = len(plan.program.pipeline.stage_ranks)
    assert sorted(path.name for path in (tmp_path / "stages").glob("*.py")) == ["run.py", *(f"stage_{k}.py" for k in range(stages))]
    model = EXAMPLES[example].model()
    torch.save({**model.state_dict(), **dict(model.named_buffers())}, tmp_path / "model.pt")
    options = ("--weights", str(tmp_path / "model.pt"), "--device", "cpu")
    staged, whole = run(tmp_path / "stages", plan.program.whole_mesh.size, *options), run(tmp_path / "whole", 2, *options)
    assert staged.returncode == 0, staged.stderr
    assert whole.returncode == 0, whole.stderr
    assert f"mesh {mesh} on cpu" in staged.stdout
    assert f"{stages} stages, {how.microbatches} microbatches, schedule {how.schedule}" in staged.stdout
    expected = losses(whole.stdout)
    assert len(expected) == 2
    for (loss, norm), (wanted_loss, wanted_norm) in zip(losses(staged.stdout), expected, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=1e-6, abs=2e-8)
        assert norm == pytest.approx(wanted_norm, rel=1e-5)


def test_the_text_of_a_rank_is_that_of_its_stages(tmp_path: Path) -> None:
    plan = emitted(tmp_path, "gpt", "pp=2,tp=2", autoshard.Pipelining(microbatches=2, schedule="interleaved_1f1b"))
    files = [(tmp_path / f"stage_{k}.py").read_text() for k in range(4)]
    assert plan.source(0) == plan.source(1) == "\n\n".join([files[0], files[2]])
    assert plan.source(2) == plan.source(3) == "\n\n".join([files[1], files[3]])
    assert autoshard.Plan.load(tmp_path / "plan.json").source(3) == plan.source(3)
    with pytest.raises(PlanError, match="rank 4 is not on mesh pp=2,tp=2, which has ranks 0 to 3"):
        plan.source(4)
    assert "the program is for mesh pp=2,tp=2, 4 processes; torchrun started 1: use --nproc-per-node 4" in run(tmp_path, 1).stderr
