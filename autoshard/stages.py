"""Stages of a pipeline as programs of their own, read off a typed program whose nodes say in which stage they stand.

places    what depends on a microbatch and on weights, in program order; each belongs to one stage
prepared  what no microbatch changes (parameters, their conversions and casts, whole arguments): once per step, in every stage
          that reads it, where autograd sums the gradients of all microbatches before they are reduced
copied    what arguments alone make (masks, positions): in every stage that reads it, as every rank has the arguments
sent      what a place makes and a later stage reads, through all stages between
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import fx

from autoshard.errors import PlanError
from autoshard.program import Facts, Program, draws_random, facts, producer, set_facts, writes_statistics
from autoshard.regions import statistics


def kinds_of(program: Program) -> dict[fx.Node, str]:
    """For every node: "held" (parameters, buffers, arguments, constants), "prepared", "copied" or "place"; the output is a place."""
    assert program.pipeline is not None
    whole = {name for name, (_, dim) in program.pipeline.inputs.items() if dim is None}
    found: dict[fx.Node, str] = {}
    varies: set[fx.Node] = set()
    for node in program.nodes():
        known = facts(node)
        if node.op == "placeholder" or (known.is_constant and known.role != "output"):
            found[node] = "held"
            if known.role == "input" and known.name not in whole:
                varies.add(node)
            continue
        operands = node.all_input_nodes
        is_drawn = draws_random(node) or known.random_axes is not None
        if is_drawn or known.role == "output" or not varies.isdisjoint(operands):
            varies.add(node)
            is_of_arguments = all(
                found[operand] == "copied" or (found[operand] == "held" and facts(operand).role not in ("parameter", "buffer"))
                for operand in operands
            )
            is_copied = is_of_arguments and not is_drawn and not known.needs_grad and not writes_statistics(node) and known.role != "output"
            found[node] = "copied" if is_copied else "place"
        else:
            found[node] = "prepared"
    return found


def shares_of_microbatch(program: Program) -> dict[fx.Node, float]:
    """Of what is done once per step, the share of one microbatch; nothing for a program without a pipeline."""
    if program.pipeline is None:
        return {}
    kinds = kinds_of(program)
    once = (node for node, kind in kinds.items() if kind == "prepared" or facts(node).role == "parameter")
    return dict.fromkeys(once, 1.0 / program.pipeline.microbatches)


def readers(node: fx.Node, kinds: dict[fx.Node, str]) -> list[fx.Node]:
    """The places that read a node that is none, directly or through others that are none; in program order."""
    seen, found, waiting = {node}, set[fx.Node](), [node]
    while waiting:
        for user in waiting.pop().users:
            if kinds[user] == "place":
                found.add(user)
            elif user not in seen:
                seen.add(user)
                waiting.append(user)
    return sorted(found)


def stage_programs(program: Program) -> tuple[Program, ...]:
    """One program per stage, from `facts(node).stage` of the places; the last one returns the results."""
    kinds = kinds_of(program)
    stage_of = {node: facts(node).stage or 0 for node, kind in kinds.items() if kind == "place"}
    assert program.pipeline is not None
    count = len(program.pipeline.stage_ranks)
    stage_of[program.output] = count - 1
    _place_updates(program, kinds, stage_of)
    _refuse_shared_statistics(stage_of)
    sent = [sent_over(program, stage_of, stage) for stage in range(count)]
    return tuple(_stage(program, kinds, stage_of, stage, sent) for stage in range(count))


def sent_over(program: Program, stage_of: dict[fx.Node, int], stage: int) -> list[fx.Node]:
    """The values that stage `stage` passes on to the next, in program order."""
    found = []
    for node, made in stage_of.items():
        if made <= stage and any(stage_of[user] > stage for user in node.users if user in stage_of):
            found.append(node)
    return found


def _place_updates(program: Program, kinds: dict[fx.Node, str], stage_of: dict[fx.Node, int]) -> None:
    """Updates of buffers that no microbatch changes belong to the stage of the module's ops."""
    modules = {facts(node).source.module: stage for node, stage in reversed(stage_of.items())}
    for node in program.nodes("update"):
        if kinds[node] != "place":
            path = facts(node.args[0]).name.rpartition(".")[0]  # type: ignore[arg-type]
            facts(node).stage = modules.get(path, 0)


def _refuse_shared_statistics(stage_of: dict[fx.Node, int]) -> None:
    """Raise PlanError where ops of two stages write one buffer: each would keep its own."""
    writers: dict[fx.Node, int] = {}
    for node, stage in stage_of.items():
        for buffer in statistics(node) if facts(node).role == "op" and writes_statistics(node) else ():
            if writers.setdefault(buffer, stage) != stage:
                raise PlanError(
                    f"{facts(buffer).name} is written by ops of stages {writers[buffer]} and {stage}; keep them in one with "
                    f"Pipelining(together=...), or leave out axis 'pp'"
                )


def _needed(kinds: dict[fx.Node, str], roots: Iterable[fx.Node]) -> set[fx.Node]:
    """What is no place and `roots` read, directly or through others."""
    found, waiting = set[fx.Node](), list(roots)
    while waiting:
        for operand in waiting.pop().all_input_nodes:
            if kinds[operand] != "place" and operand not in found:
                found.add(operand)
                waiting.append(operand)
    return found


def _stage(program: Program, kinds: dict[fx.Node, str], stage_of: dict[fx.Node, int], stage: int, sent: list[list[fx.Node]]) -> Program:
    own = [node for node, at in stage_of.items() if at == stage and node is not program.output]
    own += [node for node in program.nodes("update") if kinds[node] != "place" and facts(node).stage == stage]
    is_last = stage == len(sent) - 1
    wanted = _needed(kinds, [*own, program.output] if is_last else own) | set(own)
    wanted |= {node for node in program.nodes("parameter") if stage == 0 and not node.users}
    received = sent[stage - 1] if stage else []
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in received:
        new[node] = graph.create_node("placeholder", node.name, (), {}, name=node.name)
        source, index = producer(node)
        layouts = (facts(source).layouts[index],)
        known = Facts("received", (facts(source).values[index],), node.name, facts(node).source, layouts)
        set_facts(new[node], known)
    for node in program.graph.nodes:
        if node in wanted and node not in new:
            new[node] = graph.node_copy(node, new.__getitem__)
            new[node].name = node.name
            set_facts(new[node], replace(facts(node), is_prepared=kinds[node] == "prepared"))
    passed = program.output.args[0] if is_last else tuple(sent[stage])
    output = graph.output(fx.map_arg(passed, new.__getitem__))
    set_facts(output, replace(facts(program.output), name="" if is_last else "passed"))
    return replace(program, graph=graph, stages=(), notes=list(program.notes), stats=dict(program.stats), passes=list(program.passes))


def given_to_forward(program: Program) -> list[fx.Node]:
    """What the forward pass of a program or a stage takes, in order: what is received, then arguments."""
    return [
        node for node in program.nodes("received", "input") if not node.users or any(not facts(user).is_prepared for user in node.users)
    ]


def given_to_prepare(program: Program) -> list[fx.Node]:
    """Whole arguments that a stage computes something of once per step."""
    return [node for node in program.nodes("input") if any(facts(user).is_prepared for user in node.users)]


def prepared_by(program: Program) -> list[fx.Node]:
    """What a stage computes once per step and its forward pass reads."""
    return [node for node in program.nodes() if facts(node).is_prepared and any(not facts(user).is_prepared for user in node.users)]
