"""What a pipeline is: how the batch is taken apart in microbatches, and which stage runs where and when.

The mesh axis `pp` holds the stages. All other axes make up the mesh of a stage, on which layouts are chosen. A step runs every
stage once per microbatch; what no microbatch changes, such as gathered weights, is computed once per step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from autoshard.errors import InputError
from autoshard.mesh import MeshSpec
from autoshard.pipeline_timeline import StageCosts
from autoshard.schedules import Schedule

# How the values of a result that the microbatches have make the whole: their sum, their mean, any of them, or joined along a dim.
Joined = Literal["sum", "mean", "same"] | int


@dataclass(frozen=True)
class Pipelining:
    """What is asked of a pipeline; what is None is chosen by predicted step time.

    microbatches: how many parts the batch is cut into; must divide it. schedule: a name of autoshard.schedules, or "list" for a list of
    actions made for the costs of the stages. stages_per_rank: for schedules of several stages on a rank. starts: modules, by path,
    that each begin a stage ("model.layers.10"). together: modules that no cut may part. batch: the batch dim of an argument by name,
    or None for one that every microbatch gets whole; by default dim 0 of every tensor of the most common length.
    Raises InputError for numbers below 1 and for a text where modules are listed.
    """

    microbatches: int | None = None
    schedule: str | None = None
    stages_per_rank: int | None = None
    starts: tuple[str, ...] = ()
    together: tuple[str, ...] = ()
    batch: Mapping[str, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("microbatches", "stages_per_rank"):
            number = getattr(self, name)
            if number is not None and (not isinstance(number, int) or number < 1):
                raise InputError(f"{name}={number!r} is no number of them: give an int of 1 or more, or None to have it chosen")
        for name in ("starts", "together"):
            if isinstance(getattr(self, name), str):
                raise InputError(f"{name} lists modules: write {name}=({getattr(self, name)!r},)")


@dataclass(frozen=True)
class Pipeline:
    """Of a program whose values are those of one microbatch: where these come from, what becomes of them, and the stages.

    mesh: with the axis `pp`. inputs: of a placeholder by its name the argument that it is, and the dim along which microbatches
    cut it (None: it is given whole). rows: placeholders that get the numbers of a microbatch's rows, among how many. results: per
    result how the microbatches' are joined. stage_ranks: the rank on `pp` of every stage. schedule: per rank on `pp` what it
    runs, in order. costs: of every stage, by prediction; latency_s: of a message between stages. loss: the number of the result that
    backward starts from.
    """

    mesh: MeshSpec
    microbatches: int
    inputs: Mapping[str, tuple[str, int | None]]
    rows: Mapping[str, int]
    results: tuple[Joined, ...]
    loss: int | None = None
    name: str = ""
    stage_ranks: tuple[int, ...] = ()
    schedule: Schedule = ()
    costs: tuple[StageCosts, ...] = ()
    latency_s: float = 0.0

    @property
    def asked(self) -> Pipelining:
        """What asks for a pipeline like this one, for calls of other shapes."""
        return Pipelining(self.microbatches, self.name, len(self.stage_ranks) // self.mesh.stages)

    @property
    def described(self) -> str:
        """`4 stages on 2 ranks, 8 microbatches, schedule interleaved_1f1b`."""
        return f"{len(self.stage_ranks)} stages on {self.mesh.stages} ranks, {self.microbatches} microbatches, schedule {self.name}"
