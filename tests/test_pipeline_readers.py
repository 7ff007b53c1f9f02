"""Plans with pipeline stages say what is true of them: in tables, in words, as differences; and loaded ones run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import EXAMPLES
from processes import run_on_ranks
from rich.console import Console
from torch.distributed.device_mesh import init_device_mesh

import autoshard
from autoshard.errors import PlanError
from autoshard.stage_shares import in_flight, kept_by_rank, weights_by_rank

ARGS, KWARGS = EXAMPLES["gpt"].batch(0)


def make_plan(schedule: str = "1f1b", mesh: str = "pp=2,tp=2", microbatches: int = 4) -> autoshard.Plan:
    how = autoshard.Pipelining(microbatches=microbatches, schedule=schedule)
    return autoshard.plan(EXAMPLES["gpt"].model(), mesh, ARGS, KWARGS, hardware="h100", pipeline=how)


@pytest.fixture(scope="module")
def plan() -> autoshard.Plan:
    return make_plan()


def text_of(shown: object) -> str:
    console = Console(width=160, no_color=True)
    with console.capture() as captured:
        console.print(shown)
    return captured.get()


def test_the_table_names_mesh_schedule_and_stages(plan: autoshard.Plan) -> None:
    text = text_of(plan.table())
    assert "GPT on pp=2,tp=2 (h100), predicted step" in text
    assert "2 stages on 2 ranks, 4 microbatches, schedule 1f1b" in text
    assert "stage 0 on pp rank 0" in text
    assert "stage 1 on pp rank 1" in text
    assert "sent per step by send" in text


def test_costs_are_those_of_all_stages_and_microbatches(plan: autoshard.Plan) -> None:
    report, timeline = plan.cost, plan.timeline()
    assert report.step_s == timeline.total_s
    sent = sum(row.total_s for row in report.rows if row.kind == "send")
    assert report.total_s - sent == pytest.approx(sum(timeline.busy_s), rel=0.05)  # type: ignore[union-attr]
    moved = plan.stats["wire_bytes_per_step"]["send"]
    assert {row.wire_bytes for row in report.rows if row.kind == "send"} == {moved}  # each of two ranks sends to the other
    assert report.objective_s < report.total_s / 3  # which is of one microbatch
    assert report.shared_s != report.shared_s  # NaN: the two are not the same thing
    text = text_of(report)
    assert "on pp=2,tp=2 (h100), predicted step" in text
    assert "all stages together" in text
    assert "all stages, for one microbatch" in text
    with pytest.raises(PlanError, match="the step of pipeline stages follows from their schedule"):
        report.symbolic()


def test_explanations_speak_of_stages(plan: autoshard.Plan) -> None:
    text = str(plan.explain())
    assert "GPT on pp=2,tp=2 (h100)" in text
    assert "2 stages on 2 ranks, 4 microbatches, schedule 1f1b." in text
    assert f"of which a rank stands idle {plan.timeline().bubble:.0%} on average" in text  # type: ignore[union-attr]
    assert "stage 1 on pp rank 1: " in text
    assert "Per rank: parameters" not in text


def test_what_a_rank_keeps_is_what_the_cut_counted() -> None:
    for schedule in ("1f1b", "gpipe", "interleaved_1f1b", "zbv"):
        plan = make_plan(schedule)
        assert kept_by_rank(plan.cost) == pytest.approx(plan.program.stats["stage_bytes"])
        pipeline = plan.program.pipeline
        assert pipeline is not None
        most = [sum(in_flight(pipeline, k) for k, at in enumerate(pipeline.stage_ranks) if at == rank) for rank in range(2)]
        flight = plan.timeline().in_flight  # type: ignore[union-attr]
        assert all(mine >= together for mine, together in zip(most, flight, strict=True))
        if len(pipeline.stage_ranks) == 2:
            assert tuple(most) == flight
    whole = autoshard.plan(EXAMPLES["gpt"].model(), "tp=2", ARGS, KWARGS, hardware="h100")
    assert kept_by_rank(whole.cost) == whole.program.stats["kept_bytes"]


def test_a_tied_weight_counts_on_both_ranks_once(plan: autoshard.Plan) -> None:
    from autoshard.costs import CostModel

    costs = CostModel(plan.mesh, plan.hardware)
    whole = sum(costs.local_bytes(k.value, k.layout) for k in map(_facts, plan.program.parameters().values()))
    tied = _facts(plan.program.parameters()["head.weight"])
    held = sum(parameters for parameters, _ in weights_by_rank(plan.program, costs))
    assert held == whole + costs.local_bytes(tied.value, tied.layout)


def _facts(node: torch.fx.Node) -> autoshard.program.Facts:
    return autoshard.program.facts(node)


def test_differences_name_stages(plan: autoshard.Plan) -> None:
    assert plan.diff(plan).is_empty
    found = plan.diff(make_plan("gpipe"))
    assert not found.is_empty
    assert "2 stages on 2 ranks, 4 microbatches, schedule 1f1b -> 2 stages on 2 ranks, 4 microbatches, schedule gpipe" in found.words()
    assert (found.before_s, found.after_s) == (plan.timeline().total_s, make_plan("gpipe").timeline().total_s)
    whole = autoshard.plan(EXAMPLES["gpt"].model(), "tp=2", ARGS, KWARGS, hardware="h100")
    apart = whole.diff(plan)
    assert "mesh tp=2 -> pp=2,tp=2; no stages -> 2 stages on 2 ranks" in apart.words()
    assert (apart.before_s, apart.after_s) == (whole.cost.total_s, plan.timeline().total_s)
    assert "no stages" in text_of(apart)


def test_other_layouts_are_priced_with_their_stages(plan: autoshard.Plan) -> None:
    answer = plan.why("blocks.0.up.weight", "I" if "S" in str(plan.parameter_layouts["blocks.0.up.weight"]) else "S(0)@tp")
    assert answer.diff is None or answer.diff.before_s == plan.timeline().total_s


def test_graphs_are_drawn(plan: autoshard.Plan) -> None:
    assert "digraph" in plan.graph().source
    assert "digraph" in plan.graph("ops").source


def step_of_loaded(folder: str) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    model, reference = EXAMPLES["gpt"].model(), EXAMPLES["gpt"].model()
    plan = autoshard.Plan.load(f"{folder}/plan.json")
    with pytest.raises(PlanError, match="this plan is for mesh pp=2, not dp=2; plan again"):
        plan.apply(EXAMPLES["gpt"].model(), init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)))
    compiled = plan.apply(model, mesh)
    loss, expected = compiled(*ARGS, **KWARGS), reference(*ARGS, **KWARGS)
    assert compiled.plan is plan
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    wanted = dict(reference.named_parameters(remove_duplicate=False))
    named = [(name, parameter) for name, parameter in compiled.named_parameters() if parameter.grad is not None]
    assert named
    for name, parameter in named:
        torch.testing.assert_close(parameter.grad.full_tensor(), wanted[name].grad)


def test_a_loaded_plan_runs_on_processes(tmp_path: Path) -> None:
    make_plan(mesh="pp=2", microbatches=2).save(tmp_path / "plan.json")
    run_on_ranks(2, step_of_loaded, str(tmp_path))
