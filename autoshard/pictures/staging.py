"""Pipeline stages in pictures: the path of a module begins with its stage, so a stage is a frame as a module is, and layers repeat
within a stage only."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable

from torch import fx

from autoshard.mesh import PIPELINE_AXIS
from autoshard.pipeline import Pipeline
from autoshard.program import Program, facts
from autoshard.text import human_seconds

_STAGED = re.compile(r"§(\d+)(?:\.(.*))?", re.S)  # no module of Python code has such a name


def stages_of(program: Program) -> dict[fx.Node, int]:
    """The stage that each node is drawn in; inputs, results and what several stages read, each for itself, have none."""
    found: dict[fx.Node, int] = {}
    for node in reversed(list(program.nodes())) if program.pipeline is not None else ():
        known = facts(node)
        stages = {found.get(user) for user in node.users} if known.stage is None else {known.stage}
        if known.role not in ("input", "output") and len(stages) == 1 and (stage := stages.pop()) is not None:
            found[node] = stage
    return found


def staged(path: str, stage: int | None) -> str:
    """The path of a module within a stage; the path itself outside of all."""
    if stage is None:
        return path
    return f"§{stage}.{path}" if path else f"§{stage}"


def stage_of(path: str) -> int | None:
    """The stage of a staged path."""
    found = _STAGED.fullmatch(path)
    return int(found[1]) if found else None


def module_of(path: str) -> str:
    """A staged path without its stage."""
    found = _STAGED.fullmatch(path)
    return found[2] or "" if found else path


def is_stage(path: str) -> bool:
    """Whether a path is that of a stage itself."""
    return stage_of(path) is not None and not module_of(path)


def cut_modules(paths: Iterable[str]) -> set[str]:
    """Modules, without their stages, that stand in several stages; paths: staged ones, and those around them."""
    counts = Counter(module_of(path) for path in set(paths) if stage_of(path) is not None)
    return {module for module, count in counts.items() if module and count > 1}


def stage_title(pipeline: Pipeline, stage: int) -> tuple[str, str]:
    """Name of a stage, and what a microbatch takes there: `stage 1`, `ranks 8-15, forward 10.2 ms, backward 18.4 ms`."""
    own = pipeline.costs[stage]
    parts = {"forward": own.forward_s, "backward": own.backward_s}
    times = [f"{name} {human_seconds(seconds)}" for name, seconds in parts.items() if seconds]
    return f"stage {stage}", ", ".join([ranks_of(pipeline, pipeline.stage_ranks[stage]), *times])


def ranks_of(pipeline: Pipeline, at: int) -> str:
    """The ranks at one coordinate of `pp`: `rank 3`, `ranks 8-15`, `ranks 0, 2, 4, 6`."""
    axis = pipeline.mesh.index(PIPELINE_AXIS)
    ranks = [rank for rank, where in enumerate(pipeline.mesh.coordinates()) if where[axis] == at]
    runs = [list(run) for _, run in itertools.groupby(ranks, key=lambda rank: rank - ranks.index(rank))]
    words = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    shown = [*words[:4], *(["..."] if len(words) > 4 else [])]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(shown)}"
