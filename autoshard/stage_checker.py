"""The checker of pipeline stages: whether the stages of a program can run one after the other, and compute together what it computes.

It reads which nodes depend on a microbatch (autoshard.stages.kinds_of) and nothing of how the cut was made. Of the program: what
depends on a microbatch stands in one stage, none earlier than what it reads, and some rank runs that stage. Of the programs of
the stages: each has the places that stand in it, unchanged, and everything that they read, made there or received from the stage before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from autoshard.program import Facts, Program, facts, producer
from autoshard.stages import kinds_of


def stage_faults(program: Program) -> Iterator[str]:
    """What is wrong with the stages of a program; nothing for one without, or one that is not cut yet."""
    pipeline = program.pipeline
    if pipeline is None or not pipeline.stage_ranks:
        return
    yield from _rank_faults(pipeline.stage_ranks, pipeline.mesh.stages)
    kinds = kinds_of(program)
    found = list(_cut_faults(program, kinds, len(pipeline.stage_ranks)))
    yield from found
    if program.stages and not found:
        yield from _program_faults(program, kinds)


def _rank_faults(stage_ranks: tuple[int, ...], ranks: int) -> Iterator[str]:
    """Stages that nobody runs, and ranks that run none."""
    for stage, rank in enumerate(stage_ranks):
        if not 0 <= rank < ranks:
            yield f"stage {stage} lies on rank {rank} of axis pp, which has {ranks}: nobody runs it"
    idle = sorted(set(range(ranks)) - set(stage_ranks))
    if idle:
        yield f"no stage lies on rank {', '.join(map(str, idle))} of axis pp"


def _cut_faults(program: Program, kinds: dict[fx.Node, str], count: int) -> Iterator[str]:
    """Whether every place stands in a stage that runs, after what it reads."""
    regions: dict[int, int | None] = {}
    for node, kind in kinds.items():
        stage, role = facts(node).stage, facts(node).role
        if kind != "place":
            if stage is not None and role != "update":
                yield f"{node.name}: stands in stage {stage}, and is {kind} in every stage that reads it"
            if role == "update" and not (stage is not None and 0 <= stage < count) and program.stages:
                yield f"{node.name}: writes a buffer in stage {stage} of {count}: nobody runs it"
            continue
        if stage is None:
            yield f"{node.name}: stands in no stage"
            continue
        if not 0 <= stage < count:
            yield f"{node.name}: stands in stage {stage} of {count}, which nobody runs"
        for operand in node.all_input_nodes:
            made = facts(operand).stage if kinds[operand] == "place" else None
            if made is not None and made > stage:
                yield f"{node.name}: stands in stage {stage} and reads {operand.name} of stage {made}, which runs later"
        if role == "projection" and facts(producer(node)[0]).stage != stage:
            yield f"{node.name}: stands in stage {stage}, and is cut off from {producer(node)[0].name}"
        if role == "output" and stage != count - 1:
            yield f"{node.name}: the results leave stage {stage} of {count}, not the last one"
        region = facts(node).recompute
        if region is not None and regions.setdefault(region, stage) != stage:
            yield f"{node.name}: stands in stage {stage}, and region {region}, which runs again whole, begins in {regions[region]}"


def _program_faults(program: Program, kinds: dict[fx.Node, str]) -> Iterator[str]:
    """Whether the programs of the stages say what the program says."""
    known = {node.name: node for node in program.nodes()}
    if len(program.stages) != len(program.pipeline.stage_ranks):  # type: ignore[union-attr]
        yield f"there are programs of {len(program.stages)} stages, and ranks for {len(program.pipeline.stage_ranks)}"  # type: ignore[union-attr]
        return
    passed: list[str] = []
    for number, stage in enumerate(program.stages):
        received = [node.name for node in stage.nodes("received")]
        if received != passed:
            yield f"stage {number} receives {received}, the one before passes on {passed}"
        found = set()
        for node in stage.nodes():
            found.add(node.name)
            for fault in _node_faults(node, known, kinds, number):
                yield f"{node.name} in stage {number}: {fault}"
        own = [node.name for node in kinds if facts(node).stage == number and facts(node).role != "output"]
        missing = [name for name in own if name not in found]
        if missing:
            yield f"stage {number} lacks {', '.join(missing[:5])}"
        passed = [node.name for node in stage.output.all_input_nodes]
    if program.stages and _named(program.stages[-1].output.args) != _named(program.output.args):
        yield "the last stage returns other results than the program"


def _node_faults(node: fx.Node, known: dict[str, fx.Node], kinds: dict[fx.Node, str], number: int) -> Iterator[str]:
    """Whether a node of stage `number` is the node of that name in the whole program."""
    if node.op == "output":
        return
    original = known.get(node.name)
    if original is None:
        yield "the program has no such node"
        return
    mine, whole = facts(node), facts(original)
    if mine.role == "received":
        made = facts(producer(original)[0])
        if kinds[original] != "place" or made.stage is None or made.stage >= number:
            yield f"is received, but made in stage {made.stage}"
        elif (mine.values, mine.layouts) != (whole.values, whole.layouts):
            yield "is received in another shape or layout than it is made in"
        return
    if kinds[original] == "place" and whole.stage != number:
        yield f"stands in stage {whole.stage}"
    if mine.is_prepared != (kinds[original] == "prepared"):
        yield f"is {'' if mine.is_prepared else 'not '}computed once per step, and is {kinds[original]}"
    if _called(node) != _called(original):
        yield f"calls {node.target} on {node.args}, the program calls {original.target} on {original.args}"
    if _said(mine) != _said(whole):
        yield "has another value, layout or name than in the program"


def _said(known: Facts) -> tuple:
    """All that code is made from."""
    return (
        *(known.role, known.values, known.layouts, known.name, known.op, known.random_axes, known.site, known.is_constant),
        *(known.strategies, known.autocast, known.recompute, known.is_drawn_whole),
    )


def _called(node: fx.Node) -> tuple:
    return node.op, node.target, _named(node.args), _named(node.kwargs)


def _named(arguments: Any) -> str:
    return repr(fx.map_arg(arguments, lambda node: node.name))
