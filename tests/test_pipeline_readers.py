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
from autoshard.errors import ConstraintError, PlanError
from autoshard.stage_shares import in_flight, kept_by_rank, weights_by_rank
from autoshard.text import human_bytes

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


# ------------------------------------------------------------------------------------------------ the mesh that was given


@pytest.fixture(scope="module")
def alone() -> autoshard.Plan:
    """Stages of one rank each."""
    return make_plan(mesh="pp=2")


def test_every_text_names_the_mesh_that_was_given(alone: autoshard.Plan, plan: autoshard.Plan, tmp_path: Path) -> None:
    for found, mesh in ((alone, "pp=2"), (plan, "pp=2,tp=2")):
        assert repr(found).startswith(f"Plan(GPT on {mesh}, auto")
        assert f"GPT on {mesh} (h100)" in text_of(found.table())
        assert f"GPT on {mesh} (h100)" in str(found.explain())
        assert found.graph().source.startswith(f"// mesh {mesh}, level modules")
    shown = [text_of(alone.table()), str(alone.explain()), alone.program.source, alone.graph().source, alone.graph("ops").source]
    shown += [str(alone.why("head.weight", "I")), text_of(alone.cost), alone.report(tmp_path / "report.html", memory=True).read_text()]
    for text in shown:
        assert "@one" not in text
        assert "one=1" not in text


def test_programs_say_for_which_ranks_they_are(alone: autoshard.Plan, plan: autoshard.Plan) -> None:
    for number in range(2):
        text = alone.source(number)
        assert text.startswith(f'"""Stage {number} of 2 of GPT on mesh pp=2, training: the program of the rank at pp={number}. Written by')
        assert "    MESH = {}  # of a stage\n" in text
        assert "self.axes" not in text
        assert '"blocks.0.norm1.weight": ([16], "f64", "whole"),' in alone.program.source
        text = plan.source(2 * number)
        assert f"on mesh pp=2,tp=2, training: the program of every rank at pp={number}. Written by" in text
        assert '    MESH = {"tp": 2}  # of a stage\n' in text


def test_stages_that_convert_on_no_axis_of_the_user_still_run() -> None:
    """A plan may convert on the axis of one rank that a stage has by itself: its program then has that axis."""
    how = autoshard.Pipelining(microbatches=4, schedule="1f1b")
    options = autoshard.Options(seed=3)
    found = autoshard.plan(EXAMPLES["gpt"].model(), "pp=2", ARGS, KWARGS, pipeline=how, options=options)
    converts = any(True for _ in found.program.nodes("conversion"))
    assert ('MESH = {"one": 1}' in found.program.source) == converts
    assert found.memory("sgd").peak_bytes


def test_what_is_sent_between_stages_is_told(alone: autoshard.Plan) -> None:
    text = str(alone.explain())
    moved = alone.stats["wire_bytes_per_step"]["send"]
    assert f"Stages pass on values and send back gradients: {human_bytes(moved)} by the rank that sends most." in text
    assert "Nothing else is sent between ranks." in text


CONSTRAINED = [
    (
        "pp=2",
        "S(0)@pp",
        r"axis pp holds pipeline stages, on which nothing is laid out, and mesh pp=2 has no other axis; say where stages",
    ),
    ("pp=2,tp=2", "S(0)@pp", r"and mesh pp=2,tp=2 has tp beside it; say where stages start with Pipelining\(starts=\.\.\., together="),
    ("pp=2", "S(0)@tp", r"names axis 'tp'; axis pp holds pipeline stages, on which nothing is laid out, and mesh pp=2 has no other axis$"),
]


@pytest.mark.parametrize(("mesh", "layout", "said"), CONSTRAINED)
def test_constraints_on_other_axes_are_refused(mesh: str, layout: str, said: str) -> None:
    how = autoshard.Pipelining(microbatches=4)
    with pytest.raises(ConstraintError, match=said):
        autoshard.plan(EXAMPLES["gpt"].model(), mesh, ARGS, KWARGS, pipeline=how, constraints={"head.weight": layout})


def test_errors_of_layouts_name_the_mesh_that_was_given() -> None:
    how = autoshard.Pipelining(microbatches=4)
    with pytest.raises(ConstraintError, match=r"on mesh pp=2,tp=2 cannot satisfy|no plan on pp=2,tp=2 satisfies"):
        autoshard.plan(EXAMPLES["gpt"].model(), "pp=2,tp=2", ARGS, KWARGS, pipeline=how, constraints={"norm.weight": "S(1)@tp"})


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
