"""The simulator of a pipeline: all ranks of all stages in one process, microbatch after microbatch, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from autoshard.program import Program, facts
from autoshard.runtime import mix
from autoshard.runtime.microbatches import joined, of_microbatch
from autoshard.simulator import Ranks, Simulation, run_program


def run_stages(
    program: Program, tensors: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor], seed: int = 0, is_random: bool = True
) -> Simulation:
    """Run every stage on every microbatch. tensors, inputs: global, by name. Gradients of all microbatches add up in `leaves`.

    The results are those of the whole batch; `values` are the last microbatch's.
    """
    pipeline = program.pipeline
    assert pipeline is not None
    simulation = Simulation(program)
    results: list[list[Any]] = []
    for number in range(pipeline.microbatches):
        given: dict[str, Any] = of_microbatch(pipeline, inputs, number)
        for stage in program.stages:
            part = run_program(stage, {**tensors, **simulation.leaves}, given, mix(seed, number), is_random)
            simulation.leaves |= part.leaves
            simulation.values |= part.values
            names = [node.name for node in stage.output.all_input_nodes]
            given |= {name: part.values[name] for name in names}
        results.append(part.outputs)
    mesh = range(program.mesh.size)
    of_rank = [joined(pipeline, [[_local(value, rank) for value in values] for values in results]) for rank in mesh]
    simulation.outputs = [
        Ranks(list(values)) if isinstance(values[0], torch.Tensor) else values[0] for values in zip(*of_rank, strict=True)
    ]
    return simulation


def _local(value: Any, rank: int) -> Any:
    return value.values[rank] if isinstance(value, Ranks) else value


def parameters_of(program: Program) -> dict[str, tuple[int, ...]]:
    """By parameter the stages that hold it."""
    held: dict[str, tuple[int, ...]] = {}
    for number, stage in enumerate(program.stages):
        for node in stage.nodes("parameter"):
            held[facts(node).name] = (*held.get(facts(node).name, ()), number)
    return held
