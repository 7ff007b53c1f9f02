"""Plans with pipeline stages as files: what is saved is what is loaded, and a file that was altered or does not fit together is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import EXAMPLES, GPT
from test_plan_file import MARK, altered, load, set_path
from torch import fx

import autoshard
from autoshard.checker import check
from autoshard.errors import AutoshardError, PlacementError
from autoshard.plan_schema import check_source
from autoshard.program import Program, facts, set_facts
from autoshard.schedules import check_schedule
from autoshard.stage_checker import stage_faults
from autoshard.stages import kinds_of, stage_programs

HOW = autoshard.Pipelining(microbatches=2, schedule="1f1b")


def make_plan(example: str = "gpt", mesh: str = "pp=2,tp=2", how: autoshard.Pipelining = HOW, **asked: Any) -> autoshard.Plan:
    args, kwargs = EXAMPLES[example].batch(0)
    return autoshard.plan(EXAMPLES[example].model(), mesh, args, kwargs, hardware="h100", pipeline=how, **asked)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    make_plan(template="megatron").save(path)
    return path.read_text()


@pytest.mark.parametrize(
    ("example", "mesh", "how"),
    [
        ("gpt", "pp=2,tp=2", HOW),
        ("gpt", "pp=2", autoshard.Pipelining(microbatches=4, schedule="zbv")),
        ("hf_llama", "dp=2,pp=2", autoshard.Pipelining(microbatches=2, schedule="interleaved_1f1b")),
        ("encoder", "pp=3,tp=2", autoshard.Pipelining(microbatches=4, schedule="list")),
        ("conv_net", "pp=2", HOW),
    ],
)
def test_what_is_saved_is_what_is_loaded(example: str, mesh: str, how: autoshard.Pipelining, tmp_path: Path) -> None:
    plan = make_plan(example, mesh, how)
    plan.save(tmp_path / "first.json")
    loaded = autoshard.Plan.load(tmp_path / "first.json")
    loaded.save(tmp_path / "second.json")
    assert (tmp_path / "first.json").read_text() == (tmp_path / "second.json").read_text()
    assert loaded.program.pipeline == plan.program.pipeline
    assert [stage.source for stage in loaded.program.stages] == [stage.source for stage in plan.program.stages]
    assert loaded.fingerprint == plan.fingerprint
    assert loaded.timeline().total_s == plan.timeline().total_s
    assert loaded.stats == plan.stats
    if example != "conv_net":  # whose statistics are those of each microbatch
        args, kwargs = EXAMPLES[example].batch(0)
        assert autoshard.verify(EXAMPLES[example].model(), loaded, args, kwargs, tolerance=1e-5).is_equal


def test_evaluation_without_a_loss_is_kept(tmp_path: Path) -> None:
    ids, _ = EXAMPLES["gpt"].batch(0)[0]
    plan = autoshard.plan(GPT().eval(), "pp=2", (ids,), pipeline=autoshard.Pipelining(microbatches=2))
    plan.save(tmp_path / "plan.json")
    loaded = autoshard.Plan.load(tmp_path / "plan.json")
    assert loaded.program.pipeline == plan.program.pipeline
    assert loaded.program.pipeline is not None
    assert loaded.program.pipeline.loss is None


def test_another_schedule_has_another_fingerprint(text: str, tmp_path: Path) -> None:
    """Ranks compare fingerprints before they run: those with other orders would wait for each other for ever."""
    gpipe = [["0F0", "0F1", "0B0", "0B1"], ["1F0", "1F1", "1B0", "1B1"]]
    changed = load(altered(text, in_pipeline("schedule", value=gpipe)), tmp_path)
    assert changed.source() == load(text, tmp_path).source()
    assert changed.fingerprint != load(text, tmp_path).fingerprint


# ------------------------------------------------------------------------------------------------------ files that lie


def in_pipeline(*path: Any, value: Any) -> Callable[[dict], None]:
    return set_path("program", "pipeline", *path, value=value)


def on_place(number: int, stage: Any) -> Callable[[dict], None]:
    """Say of the place of that number, in program order, that it stands in `stage`."""

    def change(body: dict) -> None:
        places = [node for node in body["program"]["nodes"] if node["facts"]["stage"] is not None]
        places[number]["facts"]["stage"] = stage

    return change


def on_first(role: str, stage: Any) -> Callable[[dict], None]:
    return lambda body: set_path("facts", "stage", value=stage)(
        next(node for node in body["program"]["nodes"] if node["facts"]["role"] == role)
    )


def million(body: dict) -> None:
    """So many microbatches that looking for the actions of each would take for ever."""
    body["program"]["pipeline"]["microbatches"] = 10**12
    body["program"]["pipeline"]["inputs"] = {
        name: [argument, None] for name, (argument, _) in body["program"]["pipeline"]["inputs"].items()
    }
    for node in body["program"]["nodes"]:
        if node["facts"]["name"] == "labels of all microbatches":
            node["facts"]["values"][0][0] = [2, 8]


MALICIOUS: dict[str, tuple[Callable[[dict], Any], str]] = {
    "an op in a later stage than its reader": (on_place(0, 1), "stands in stage 0 and reads tok_embedding of stage 1, which runs later"),
    "an op in no stage": (on_place(3, None), "stands in no stage"),
    "an op in a stage that nobody runs": (on_place(-2, 2), "a node stands in stage 2 of 2"),
    "a stage before the first": (on_place(0, -1), "a node stands in stage -1"),
    "a stage that is no number": (on_place(0, f"0\n{MARK}"), "a node stands in stage"),
    "a stage that is a boolean": (on_place(0, True), "a node stands in stage True"),
    "a parameter in a stage": (on_first("parameter", 0), "stands in stage 0, and is held in every stage that reads it"),
    "results that leave the first stage": (on_place(-1, 0), "of stage 1, which runs later"),
    "no pipeline": (set_path("program", "pipeline", value=None), "a node stands in a pipeline stage, and there is no pipeline"),
    "a pipeline of text": (set_path("program", "pipeline", value=MARK), "does not describe a program: TypeError"),
    "a mesh without pp": (in_pipeline("mesh", value={"axes": ["tp"], "shape": [2]}), "the mesh of its pipeline is tp=2"),
    "a mesh of other axes": (in_pipeline("mesh", value={"axes": ["pp", "dp"], "shape": [2, 2]}), "its stages are on mesh tp=2"),
    "a mesh with half a rank": (in_pipeline("mesh", "shape", value=[2, 2.0]), "the mesh of its pipeline is pp=2,tp=2.0"),
    "more ranks than stages": (in_pipeline("mesh", "shape", value=[3, 2]), "its stages lie on the ranks [0, 1] of axis pp, which has 3"),
    "stage_ranks on absent ranks": (in_pipeline("stage_ranks", value=[0, 2]), "its stages lie on the ranks [0, 2] of axis pp, which has 2"),
    "stage_ranks on one rank": (in_pipeline("stage_ranks", value=[0, 0]), "its stages lie on the ranks [0] of axis pp"),
    "a stage_rank that is a boolean": (in_pipeline("stage_ranks", value=[0, True]), "stage_ranks are [0, True]"),
    "more stages than the schedule has": (in_pipeline("stage_ranks", value=[0, 1, 0]), "a schedule of 8 actions is too short for 3 stages"),
    "no microbatch": (in_pipeline("microbatches", value=0), "microbatches are 0"),
    "fewer microbatches than none": (in_pipeline("microbatches", value=-2), "microbatches are -2"),
    "microbatches that are no number": (in_pipeline("microbatches", value="2"), "microbatches are '2'"),
    "a million million microbatches": (in_pipeline("microbatches", value=10**12), "labels would have to be [2000000000000, 8]"),
    "a million million microbatches of whole arguments": (million, "a schedule of 8 actions is too short for 2 stages"),
    "one microbatch": (in_pipeline("microbatches", value=1), "labels would have to be [2, 8] and [4, 8]"),
    "a schedule that deadlocks": (
        in_pipeline("schedule", value=[["0F0", "0B0", "0F1", "0B1"], ["1F1", "1B1", "1F0", "1B0"]]),
        "the schedule deadlocks: rank 0 at 0B0 for 1B0, rank 1 at 1F1 for 0F1",
    ),
    "a schedule with code": (in_pipeline("schedule", 0, 0, value=f"{MARK}"), "is no action of a pipeline schedule"),
    "an action that is no text": (in_pipeline("schedule", 0, 0, value=["0F0"]), "an action of its schedule is no text"),
    "an action that is missing": (
        in_pipeline("schedule", 1, value=["1F0", "1B0", "1F1", "1F1"]),
        "1F1 runs twice, 1B1 (or 1I1 and 1W1) is missing",
    ),
    "an action on another rank": (in_pipeline("schedule", value=[[], []]), "a schedule of 0 actions is too short"),
    "a schedule of one rank": (
        in_pipeline("schedule", value=[["0F0", "0F1", "1F0", "1F1", "1B0", "1B1", "0B0", "0B1"]]),
        "the schedule is of 1 ranks, its stages lie on 2",
    ),
    "a schedule with an unknown name": (in_pipeline("name", value=f"1f1b\n{MARK}"), "its schedule is called"),
    "an unknown placeholder": (in_pipeline("inputs", value={"idx": ["ids", 0]}), "its pipeline gives ['idx']"),
    "an unknown argument": (in_pipeline("inputs", "ids", value=["idx", 0]), "ids is cut out of 'idx', which is no argument"),
    "code in an argument": (in_pipeline("inputs", "ids", value=[f'")\n{MARK}', 0]), "which is no argument"),
    "a dim that there is not": (in_pipeline("inputs", "ids", value=["ids", 2]), "ids, of shape [2, 8], is cut along dim 2"),
    "a dim from the end": (in_pipeline("inputs", "ids", value=["ids", -1]), "is cut along dim -1"),
    "a whole argument that is cut": (
        in_pipeline("inputs", "labels of all microbatches", value=["labels", 0]),
        "labels would have to be [4, 8] and [8, 8]",
    ),
    "an argument that nothing reads": (
        in_pipeline("inputs", "ids", value=["labels", 0]),
        "no microbatch is given anything of ids",
    ),
    "rows of an argument": (in_pipeline("rows", value={"ids": 4}), "its pipeline gives ['ids', 'ids', 'labels'"),
    "too few results": (in_pipeline("results", value=[]), "its program returns 1 results, its pipeline joins []"),
    "too many results": (in_pipeline("results", value=["sum", "sum"]), "its program returns 1 results"),
    "a result along a dim that it has not": (in_pipeline("results", value=[0]), "result 0 is joined by 0"),
    "a result that is joined by code": (in_pipeline("results", value=[MARK]), "result 0 is joined by"),
    "a loss that there is not": (in_pipeline("loss", value=1), "its loss is result 1 of 1"),
    "a loss that is a text": (in_pipeline("loss", value="0"), "its loss is result '0' of 1"),
    "negative costs": (in_pipeline("costs", 0, "forward_s", value=-1e-3), "the costs of a stage are {'forward_s': -0.001}"),
    "the mark of costs that are left out": (in_pipeline("costs", 1, "backward_input_s", value=-1.0), "{'backward_input_s': -1.0}"),
    "costs that are no number": (in_pipeline("costs", 0, "kept_bytes", value=float("nan")), "the costs of a stage are {'kept_bytes': nan}"),
    "costs without end": (in_pipeline("costs", 1, "send_s", value=float("inf")), "the costs of a stage are {'send_s': inf}"),
    "a part that is more than the whole": (in_pipeline("costs", 0, "backward_input_s", value=1e6), "is a part of backward_s"),
    "costs of one stage": (lambda body: body["program"]["pipeline"]["costs"].pop(), "it has 2 stages and the costs of 1"),
    "costs of another kind": (in_pipeline("costs", 0, value={"forward_s": 1.0}), "the costs of a stage are {'forward_s': 1.0}"),
    "a negative latency": (in_pipeline("latency_s", value=-1.0), "latency_s is -1.0"),
    "a latency that is no number": (in_pipeline("latency_s", value=float("nan")), "latency_s is nan"),
    "a missing field": (lambda body: body["program"]["pipeline"].pop("results"), "does not describe a program: KeyError: 'results'"),
    "an op of another layout": (
        lambda body: set_path("facts", "layouts", value=["S(0)@tp"])(
            next(node for node in body["program"]["nodes"] if "aten.gelu" in node["target"])
        ),
        "does not type-check",
    ),
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_an_altered_pipeline_with_a_fitting_checksum_is_refused(name: str, text: str, tmp_path: Path) -> None:
    change, reason = MALICIOUS[name]
    with pytest.raises(AutoshardError) as caught:
        load(altered(text, change), tmp_path)
    assert reason in str(caught.value)


def test_fields_of_other_types_give_one_kind_of_error(text: str, tmp_path: Path) -> None:
    """Every field of the pipeline, replaced by values of other types: refused, or a plan whose schedule comes to its end."""
    pipeline = json.loads(text)["program"]["pipeline"]
    paths = (
        [(key,) for key in pipeline] + [("costs", 0, key) for key in pipeline["costs"][0]] + [("inputs", key) for key in pipeline["inputs"]]
    )
    refused = 0
    for path in paths:
        for value in (None, 7, "x", [], {}, [[]], [{"node": "none"}], True, float("nan"), -1):
            try:
                changed = load(altered(text, in_pipeline(*path, value=copy.deepcopy(value))), tmp_path)
            except AutoshardError:
                refused += 1
                continue
            check_source(changed.source())
            found = changed.program.pipeline
            assert found is not None
            check_schedule(found.schedule, found.stage_ranks, found.microbatches)
            assert changed.timeline().total_s > 0
    assert refused > 8 * len(paths)


# ------------------------------------------------------------------------------------------------------ planted mistakes


@pytest.fixture(scope="module")
def program() -> Program:
    return make_plan(
        "hf_llama", "pp=2,tp=2", autoshard.Pipelining(microbatches=2, schedule="interleaved_1f1b"), template="megatron"
    ).program


def cut_otherwise(program: Program) -> Program:
    """A copy whose facts may change, with programs of its stages."""
    new = program.on_mesh(program.mesh)
    new.stages = stage_programs(new)
    check(new)
    return new


def test_every_move_of_an_op_to_another_stage_is_judged(program: Program) -> None:
    """A place in another stage is refused, but where nothing that it reads or that reads it forbids it: then its stages run."""
    pipeline = program.pipeline
    assert pipeline is not None
    kinds = kinds_of(program)
    refused = allowed = 0
    for node in [node for node, kind in kinds.items() if kind == "place"]:
        before = facts(node).stage
        assert before is not None
        made = [facts(operand).stage for operand in node.all_input_nodes if kinds[operand] == "place"]
        read = [facts(user).stage for user in node.users]
        parts = [facts(user) for user in node.users if facts(user).role == "projection"]
        for stage in (None, -1, *range(len(pipeline.stage_ranks) + 1)):
            if stage == before:
                continue
            facts(node).stage = stage
            is_sound = (
                stage is not None
                and 0 <= stage < len(pipeline.stage_ranks)
                and all(s is not None and s <= stage for s in made)
                and all(s is not None and s >= stage for s in read)
                and not parts
                and facts(node).role not in ("projection", "output")
            )
            found = list(stage_faults(replace(program, stages=())))
            assert is_sound == (not found), f"{node.name} in stage {stage}: {found}"
            allowed, refused = allowed + is_sound, refused + (not is_sound)
        facts(node).stage = before
    assert refused > 100
    assert allowed > 0
    check(program)


def without_edge(stage: Program, node: fx.Node) -> None:
    """Take a node out of a stage; its users read what it read."""
    node.replace_all_uses_with(node.all_input_nodes[0])
    stage.graph.erase_node(node)


def places(stage: Program) -> list[fx.Node]:
    return [
        node for node in stage.nodes("op", "conversion") if facts(node).stage is not None and len(node.all_input_nodes) == 1 and node.users
    ]


def change_facts(node: fx.Node, **new: Any) -> None:
    set_facts(node, replace(facts(node), **new))


def drop_received(program: Program) -> None:
    stage = program.stages[1]
    node, other = list(stage.nodes("received"))[:2]
    node.replace_all_uses_with(other)
    stage.graph.erase_node(node)


def swap_received(program: Program) -> None:
    stage = program.stages[2]
    first, second = list(stage.nodes("received"))[:2]
    second.append(first)


def drop_passed(program: Program) -> None:
    output = program.stages[0].output
    output.args = (tuple(output.args[0])[1:],)  # type: ignore[arg-type]


def drop_place(program: Program) -> None:
    without_edge(program.stages[1], places(program.stages[1])[0])


def drop_prepared(program: Program) -> None:
    stage = program.stages[0]
    without_edge(stage, next(node for node in stage.nodes("conversion") if facts(node).is_prepared))


def rewire(program: Program) -> None:
    stage = program.stages[1]
    node = next(node for node in stage.nodes("op") if len(set(node.all_input_nodes)) == 2 and not facts(node).is_prepared)
    node.replace_input_with(*node.all_input_nodes[:2])


def exchange_stages(program: Program) -> None:
    first, second, *rest = program.stages
    program.stages = (second, first, *rest)


def return_other(program: Program) -> None:
    stage = program.stages[-1]
    last = places(stage)[-1]
    stage.output.args = ((last, *tuple(stage.output.args[0])[1:]),)  # type: ignore[arg-type]


def on_ranks(*ranks: int) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        assert program.pipeline is not None
        program.pipeline = replace(program.pipeline, stage_ranks=ranks)

    return change


def on_node(role: str, **new: Any) -> Callable[[Program], None]:
    return lambda program: change_facts(next(n for n in program.stages[1].nodes(role)), **new)  # type: ignore[arg-type]


PLANTED: dict[str, tuple[Callable[[Program], Any], str]] = {
    "a received value is dropped": (drop_received, "the one before passes on"),
    "received values change places": (swap_received, "the one before passes on"),
    "a value is not passed on": (drop_passed, "the one before passes on"),
    "a place is dropped": (drop_place, "stage 1 lacks"),
    "the conversion of a weight is dropped": (drop_prepared, "the program calls"),
    "an op reads another value": (rewire, "the program calls"),
    "stages change places": (exchange_stages, "the one before passes on"),
    "a stage is missing": (lambda program: setattr(program, "stages", program.stages[:-1]), "programs of 3 stages"),
    "another result is returned": (return_other, "the last stage returns other results"),
    "a value is received in another layout": (
        lambda program: change_facts(next(program.stages[1].nodes("received")), layouts=()),
        "is received in another shape or layout",
    ),
    "a weight is prepared for every microbatch": (
        lambda program: change_facts(next(n for n in program.stages[1].nodes("conversion") if facts(n).is_prepared), is_prepared=False),
        "is not computed once per step, and is prepared",
    ),
    "a microbatch is prepared": (
        lambda program: change_facts(places(program.stages[1])[0], is_prepared=True),
        "computed once per step, and is place",
    ),
    "another parameter is read": (on_node("parameter", name="model.norm.weight"), "another value, layout or name"),
    "another op": (lambda program: setattr(places(program.stages[1])[0], "target", "other"), "the program calls"),
    "a stage that nobody runs": (on_ranks(0, 1, 2, 1), "stage 2 lies on rank 2 of axis pp, which has 2: nobody runs it"),
    "a rank that runs nothing": (on_ranks(0, 0, 0, 0), "no stage lies on rank 1 of axis pp"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_mistakes_are_found(name: str, program: Program) -> None:
    change, reason = PLANTED[name]
    wrong = cut_otherwise(program)
    change(wrong)
    with pytest.raises(PlacementError) as caught:
        check(wrong)
    assert reason in str(caught.value)


def test_stages_that_fit_are_found_sound(program: Program) -> None:
    check(program)
    check(cut_otherwise(program))
