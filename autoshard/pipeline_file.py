"""The pipeline of a plan file: written as plain data, and read back with every number checked against the program beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from autoshard.errors import PlanError
from autoshard.mesh import PIPELINE_AXIS, MeshSpec
from autoshard.pipeline import Joined, Pipeline
from autoshard.pipeline_timeline import StageCosts
from autoshard.plan_schema import is_quotable, require
from autoshard.program import Facts, Program, facts
from autoshard.schedules import NAMES, Action, Schedule, check_schedule

_COSTS = tuple(field.name for field in dataclasses.fields(StageCosts))
_NAMES = (*NAMES, "list")


def pipeline_body(pipeline: Pipeline) -> dict[str, Any]:
    """The pipeline as JSON has it; actions as their texts."""
    return {
        "mesh": {"axes": list(pipeline.mesh.axes), "shape": list(pipeline.mesh.shape)},
        "microbatches": pipeline.microbatches,
        "inputs": {name: list(given) for name, given in pipeline.inputs.items()},
        "rows": dict(pipeline.rows),
        "results": list(pipeline.results),
        "loss": pipeline.loss,
        "name": pipeline.name,
        "stage_ranks": list(pipeline.stage_ranks),
        "schedule": [[str(action) for action in actions] for actions in pipeline.schedule],
        "costs": [dataclasses.asdict(costs) for costs in pipeline.costs],
        "latency_s": pipeline.latency_s,
    }


def read_pipeline(body: Mapping[str, Any], program: Program) -> Pipeline:
    """Inverse of pipeline_body, for the program of one microbatch that the file has. Raises PlanError for what does not fit it."""
    from autoshard.pipeline_limits import refuse

    refuse(program)
    mesh = MeshSpec(tuple(body["mesh"]["axes"]), tuple(body["mesh"]["shape"]))
    require(all(map(_is_count, mesh.shape)) and PIPELINE_AXIS in mesh.axes, f"the mesh of its pipeline is {mesh}")
    require(mesh.of_stage == program.mesh, f"its stages are on mesh {program.mesh}, its pipeline on {mesh}")
    microbatches, name = body["microbatches"], body["name"]
    require(_is_count(microbatches) and microbatches >= 1, f"microbatches are {microbatches!r}")
    require(name in _NAMES, f"its schedule is called {name!r}; there are {', '.join(_NAMES)}")
    inputs, rows = _read_inputs(body["inputs"], body["rows"], microbatches, program)
    results, loss = _read_results(body["results"], body["loss"], program)
    stage_ranks = _read_stage_ranks(body["stage_ranks"], mesh.stages)
    schedule = _read_schedule(body["schedule"], stage_ranks, microbatches)
    costs, latency_s = tuple(map(_read_costs, body["costs"])), body["latency_s"]
    require(len(costs) == len(stage_ranks), f"it has {len(stage_ranks)} stages and the costs of {len(costs)}")
    require(_is_amount(latency_s), f"latency_s is {latency_s!r}")
    return Pipeline(mesh, microbatches, inputs, rows, results, loss, name, stage_ranks, schedule, costs, latency_s)


def _is_count(number: Any) -> bool:
    return type(number) is int and number >= 0


def _is_amount(number: Any) -> bool:
    return type(number) in (int, float) and 0 <= number < float("inf")


def _read_inputs(given: Any, rows: Any, microbatches: int, program: Program) -> tuple[dict[str, tuple[str, int | None]], dict[str, int]]:
    """Of every placeholder the argument and its batch dim, or among how many rows it counts."""
    require(type(given) is dict and type(rows) is dict, "the inputs and rows of its pipeline")
    known = {facts(node).name: facts(node) for node in program.nodes("input")}
    require(sorted([*given, *rows]) == sorted(known), f"its pipeline gives {sorted([*given, *rows])}, its program takes {sorted(known)}")
    arguments: dict[str, Facts] = {}
    for name, (argument, dim) in given.items():
        shape = known[name].value.shape
        require(is_quotable(argument) and argument in program.flat_inputs, f"{name} is cut out of {argument!r}, which is no argument")
        require(dim is None or (_is_count(dim) and dim < len(shape)), f"{name}, of shape {list(shape)}, is cut along dim {dim!r}")
        whole = tuple(size * (microbatches if k == dim else 1) for k, size in enumerate(shape))
        value = dataclasses.replace(known[name].value, shape=whole)
        first = arguments.setdefault(argument, dataclasses.replace(known[name], values=(value,)))
        is_alike = (first.value.shape, first.value.dtype, first.layouts) == (whole, value.dtype, known[name].layouts)
        require(is_alike, f"{argument} would have to be {list(first.value.shape)} and {list(whole)}")
    missing = [name for name in program.flat_inputs if name is not None and name not in arguments]
    require(not missing, f"no microbatch is given anything of {', '.join(missing)}")
    for name, length in rows.items():
        value = known[name].value
        is_part = _is_count(length) and value.shape == (length // microbatches,) and length % microbatches == 0
        require(is_part and value.dtype == torch.int64, f"{name}, {value.dtype} of shape {list(value.shape)}, counts {length!r} rows")
    return {name: (argument, dim) for name, (argument, dim) in given.items()}, dict(rows)


def _read_results(given: Any, loss: Any, program: Program) -> tuple[tuple[Joined, ...], int | None]:
    """How results are joined, and which of them backward starts from."""
    nodes: Any = program.output.args[0]
    require(type(given) is list and len(given) == len(nodes), f"its program returns {len(nodes)} results, its pipeline joins {given!r}")
    for number, (how, node) in enumerate(zip(given, nodes, strict=True)):
        dims = len(facts(node).value.shape) if isinstance(node, fx.Node) else 0
        require(how in ("sum", "mean", "same") or (_is_count(how) and how < dims), f"result {number} is joined by {how!r}")
    is_number = loss is None or (_is_count(loss) and loss < len(nodes) and isinstance(nodes[loss], fx.Node))
    require(is_number, f"its loss is result {loss!r} of {len(nodes)}")
    if loss is not None:
        value = facts(nodes[loss]).value
        require(value.needs_grad and not value.shape, f"its loss, result {loss}, is not one number with a gradient")
    return tuple(given), loss


def _read_stage_ranks(given: Any, ranks: int) -> tuple[int, ...]:
    require(type(given) is list and all(map(_is_count, given)), f"stage_ranks are {given!r}")
    is_covered = set(given) == set(range(ranks))
    require(is_covered, f"its stages lie on the ranks {sorted(set(given))} of axis {PIPELINE_AXIS}, which has {ranks}: each has to run one")
    return tuple(given)


def _read_schedule(given: Any, stage_ranks: tuple[int, ...], microbatches: int) -> Schedule:
    require(type(given) is list and all(type(actions) is list for actions in given), "its schedule is no list of a list per rank")
    texts = [text for actions in given for text in actions]
    require(all(isinstance(text, str) for text in texts), "an action of its schedule is no text")
    least = 2 * len(stage_ranks) * microbatches  # said here, as the check below looks for every action by itself
    require(
        len(texts) >= least,
        f"a schedule of {len(texts)} actions is too short for {len(stage_ranks)} stages and {microbatches} microbatches",
    )
    schedule = tuple(tuple(map(Action.parse, actions)) for actions in given)
    check_schedule(schedule, stage_ranks, microbatches)
    return schedule


def _read_costs(given: Any) -> StageCosts:
    require(type(given) is dict and sorted(given) == sorted(_COSTS), f"the costs of a stage are {given!r}")
    wrong = {name: number for name, number in given.items() if not _is_amount(number)}
    require(not wrong, f"the costs of a stage are {wrong}")
    return StageCosts(**given)


def check_stage(stage: Any, pipeline: Mapping[str, Any] | None) -> None:
    """Whether a node may stand in stage number `stage` of the pipeline that the file has (None: it has none). Raises PlanError."""
    if stage is None:
        return
    if pipeline is None:
        raise PlanError("the plan is malformed: a node stands in a pipeline stage, and there is no pipeline")
    count = len(pipeline["stage_ranks"])
    require(_is_count(stage) and stage < count, f"a node stands in stage {stage!r} of {count}")
