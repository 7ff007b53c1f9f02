"""Planning an edited model with an earlier plan's layouts: parameters that the edit left alone keep theirs, the rest is solved.

A parameter is the same if it has the same name and shape; tied names count as names of one parameter. What modules return
and how ops are split is solved anew around the layouts that are kept.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from autoshard.errors import PlanError
from autoshard.mesh import MeshSpec
from autoshard.placements import Layout, local_shape
from autoshard.program import Program, facts
from autoshard.text import fold_name

if TYPE_CHECKING:
    from autoshard.plan import Plan

_MOST_SHOWN = 8


@dataclass(frozen=True)
class Reuse:
    """layouts: of parameters that keep theirs. anew: why -> parameters that do not. gone: names that the model no longer has."""

    layouts: Mapping[str, Layout]
    anew: Mapping[str, Sequence[str]]
    gone: Sequence[str]

    def notes(self, program: Program) -> Iterator[str]:
        """What was kept and what was not, one sentence each, for the parameters that `program` reads."""
        read = program.parameters()
        yield f"{sum(name in read for name in self.layouts)} parameters keep the layouts of the plan that was reused"
        for why, names in self.anew.items():
            solved = [name for name in names if name in read]
            if solved:
                yield f"solved anew, {why}: {_listed(solved)}"
        if self.gone:
            yield f"no longer in the model: {_listed(self.gone)}"


def reuse_of(earlier: Plan | str | Path, model: nn.Module, mesh: MeshSpec, constraints: Mapping[str, str]) -> Reuse:
    """What of an earlier plan holds for `model` on `mesh`. What `constraints` name is theirs to say.

    Raises PlanError for a file that is no plan, for a mesh with other axes, and for a plan that shares no parameter with the model.
    """
    from autoshard.plan import Plan

    if not isinstance(earlier, (Plan, str, Path)):
        raise PlanError(f"reuse is a plan or the path of a saved one, not {type(earlier).__name__}")
    old = earlier if isinstance(earlier, Plan) else Plan.load(earlier)
    if old.mesh.axes != mesh.axes:
        raise PlanError(f"the plan to reuse is for axes {', '.join(old.mesh.axes)}, this mesh has {', '.join(mesh.axes)}; name them alike")
    known = {name: facts(node) for name, node in old.program.parameters().items()}
    known |= {alias: known[target] for alias, target in old.program.aliases.items() if target in known}
    kept: dict[str, Layout] = {}
    left: dict[str, list[str]] = {}
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in named.items():
        shape = tuple(parameter.shape)
        if name not in known:
            left.setdefault("new", []).append(name)
        elif known[name].value.shape != shape:
            left.setdefault(f"its shape was {list(known[name].value.shape)} and is {list(shape)}", []).append(name)
        elif _is_pinned(name, constraints):
            left.setdefault("constraints name it", []).append(name)
        elif local_shape(shape, known[name].layout, mesh.shape) is None:
            left.setdefault(f"its layout does not fit mesh {mesh}", []).append(name)
        else:
            kept[name] = known[name].layout
    if not any(name in known for name in named):
        raise PlanError(
            f"the plan to reuse was made for another model, {old.model_name}: no parameter of {type(model).__name__} is in it; "
            "plan without reuse"
        )
    gone = [name for name in known if name not in named]
    return Reuse(kept, left, gone)


def _is_pinned(name: str, constraints: Mapping[str, str]) -> bool:
    """Whether a constraint of the caller names the parameter."""
    patterns = ((kind, rest) for kind, _, rest in (pattern.rpartition(":") for pattern in constraints))
    return any("parameter".startswith(kind) and fnmatch.fnmatchcase(name, rest) for kind, rest in patterns)


def _listed(names: Iterable[str]) -> str:
    """Names with those of repeated layers folded."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(fold_name(name), []).append(name)
    texts = [f"{folded} x{len(same)}" if len(same) > 1 else same[0] for folded, same in groups.items()]
    return ", ".join(texts[:_MOST_SHOWN]) + (f" and {len(texts) - _MOST_SHOWN} more" if len(texts) > _MOST_SHOWN else "")
