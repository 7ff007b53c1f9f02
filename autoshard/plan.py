"""A plan: every decision about one model on one mesh, for one mode and one set of input shapes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autoshard import plan_file
from autoshard.checker import check
from autoshard.costs import CostModel
from autoshard.errors import AutoshardError, PlanError
from autoshard.hardware import Hardware
from autoshard.instantiation import check_sizes, leaf_marks, sizes_of
from autoshard.memory import Memory, device_type_of, memory_by_rank, memory_of
from autoshard.mesh import PIPELINE_AXIS, MeshSpec
from autoshard.ops.row import TensorInfo
from autoshard.pipeline_file import pipeline_body
from autoshard.pipeline_timeline import PipelineTimeline, simulate
from autoshard.placements import Layout, shown_layout
from autoshard.plan_schema import check_source
from autoshard.program import Program, facts
from autoshard.rehearsal import DeviceType, MakeOptimizer
from autoshard.resolving import Resolver
from autoshard.stage_shares import stage_shares
from autoshard.stages import stage_programs
from autoshard.text import fold_name, human_bytes, human_seconds, short_dtype
from autoshard.timeline import Timeline, timeline_of
from autoshard.traffic import traffic

if TYPE_CHECKING:
    from autoshard.cost_report import CostReport
    from autoshard.explanation import Explanation
    from autoshard.module import ShardedModule
    from autoshard.pictures import Picture
    from autoshard.plan_diff import PlanDiff
    from autoshard.why import Why

_HERE = Path(__file__).parent


@dataclass
class Plan:
    """What `autoshard.plan` returns; `stats`, `source`, `table`, `graph` are for reading, `apply` for running.

    Where dims were called dynamic, it serves all sizes of these at which `sizes_of` finds no fault.

    model_name: class of the model. inputs, outputs: how plain tensors are given and results come back
    (see autoshard.compile). template, constraints: what was asked. resolver: what it takes to solve again; files do not hold it.
    """

    program: Program
    hardware: Hardware
    model_name: str = "model"
    inputs: str = "global"
    outputs: str = "whole"
    template: str = "auto"
    constraints: Mapping[str, str] = field(default_factory=dict)
    resolver: Resolver | None = field(default=None, repr=False, compare=False)

    @property
    def mesh(self) -> MeshSpec:
        return self.program.mesh

    @property
    def notes(self) -> list[str]:
        """What the user must know: fallbacks, losses, gaps; one sentence each."""
        return self.program.notes

    @property
    def parameter_layouts(self) -> dict[str, Layout]:
        """Where each parameter rests, by the name that the program reads."""
        return {name: facts(node).layout for name, node in self.program.parameters().items()}

    @property
    def stats(self) -> dict[str, Any]:
        """Seconds per phase (`trace_s`, `solve_s`, `emit_s`, ...), `nodes`, `objective_s`, `bound_s`, and what a step moves.

        predicted_s: seconds of a training step on the timeline, overlap counted. wire_bytes_per_step: bytes that a rank
        sends in one forward and backward pass, by collective.
        """
        moved = traffic(self.program, CostModel(self.mesh, self.hardware))
        predicted = {"predicted_s": self.timeline().total_s, "wire_bytes_per_step": moved}
        return {**self.program.stats, "nodes": len(self.program.graph.nodes), **predicted}

    def timeline(self) -> Timeline | PipelineTimeline:
        """One predicted training step: what runs when on the compute stream and on each axis' communication stream.

        `.total_s`, `.compute_s`, `.exposed_s` (by axis, seconds in which compute stands still for collectives), `.events`,
        `.to_chrome_trace(path)`. With pipeline stages: what every rank of `pp` runs when, by the very list of actions that is
        executed; `.bubble` is the share of idle time, `.in_flight` the most microbatches kept by each rank.
        """
        pipeline = self.program.pipeline
        if pipeline is not None:
            return simulate(pipeline.schedule, pipeline.costs, pipeline.stage_ranks, pipeline.latency_s)
        return timeline_of(self.program, CostModel(self.mesh, self.hardware))

    @property
    def cost(self) -> CostReport:
        """What every node costs, in seconds, flops and bytes; prints as a table."""
        from autoshard.cost_report import price

        return price(self)

    def explain(self) -> Explanation:
        """Where time and memory go, by module, what is sent and why, in words and tables that fit one screen."""
        from autoshard.explanation import explain

        return explain(self)

    def why(self, name: str, layout: str) -> Why:
        """What it would cost, and what else change, if `name` had `layout`: `plan.why("head.weight", "S(0)@tp")`.

        name: a parameter, an input, a module (what it returns) or a node of the program. The search is solved again.
        Raises PlanError for unknown names and loaded plans, ConstraintError for a layout that cannot be read.
        """
        from autoshard.why import why

        return why(self, name, layout)

    def diff(self, other: Plan) -> PlanDiff:
        """What `other` does otherwise: layouts, collectives, predicted time and memory. Meshes and models may differ."""
        from autoshard.plan_diff import diff

        return diff(self, other)

    @property
    def fingerprint(self) -> str:
        """Digest of the emitted program, its inputs and its pipeline; equal on ranks that will run the same thing."""
        pipeline = [] if self.program.pipeline is None else [pipeline_body(self.program.pipeline)]
        read = [self.program.source, str(self.mesh), str(self.program.in_spec), self.program.flat_inputs]
        return plan_file.digest([*read, *pipeline])

    # ------------------------------------------------------------------------------------------------------ to read

    def source(self, rank: int = 0) -> str:
        """The program text of `rank`: that of all ranks, or of the pipeline stages that it runs, in order."""
        here, pipeline = self._place(rank), self.program.pipeline
        if pipeline is None:
            return self.program.source
        own = (stage.source for at, stage in zip(pipeline.stage_ranks, self.program.stages, strict=True) if at == here)
        return "\n\n".join(own)

    def memory(self, optimizer: str | MakeOptimizer | None = "adamw", device: DeviceType | None = None, rank: int | None = None) -> Memory:
        """Predicted bytes of one rank in one training step: the peak, the curve over the step, and whose the bytes are.

        optimizer: "sgd", "sgd_momentum", "adam", "adamw", "adafactor", a function from a list of parameters to a torch optimizer
        (which may set foreach=True, say), or None for inference. device: whose kernels and allocator, "cpu" or "cuda"; by default
        what the plan's hardware is. rank: which one; by default with pipeline stages the rank that needs most, as without them all
        need the same. Some seconds for a model of thousands of ops, times ranks of `pp` and microbatches. Raises InputError, PlanError.
        """
        given = self.program, optimizer, device or device_type_of(self.hardware), self.hardware.device.name
        if rank is None:
            return max(memory_by_rank(*given), key=lambda memory: memory.reserved_bytes)
        return memory_of(*given, self._place(rank))

    def _place(self, rank: int) -> int | None:
        """The place of a rank of the mesh along `pp`; None without pipeline stages. Raises PlanError for no such rank."""
        mesh = self.program.whole_mesh
        if not 0 <= rank < mesh.size:
            raise PlanError(f"rank {rank} is not on mesh {mesh}, which has ranks 0 to {mesh.size - 1}")
        return None if self.program.pipeline is None else mesh.coordinates()[rank][mesh.index(PIPELINE_AXIS)]

    def graph(self, level: str = "modules") -> Picture:
        """The partitioned graph as a graphviz.Digraph, with a tooltip on every node.

        level: "modules": a card per module, repeated layers drawn once; "layer": one of the repeated layers in full; "ops": every node,
        as far as 500 reach. `.source` is the DOT text, `.render(outfile="plan.svg")` needs Graphviz's `dot`. Raises InputError.
        """
        from autoshard.pictures import draw

        return draw(self.program, level, CostModel(self.mesh, self.hardware))  # type: ignore[arg-type]

    def table(self) -> Table:
        """Parameters with shapes and layouts, equal layers in one row, pipeline stages, and what a step communicates.

        With stages a parameter's bytes are those of a rank that holds it, and what is sent is of the rank along `pp` that sends most.
        """
        cost = CostModel(self.mesh, self.hardware)
        predicted, pipeline = human_seconds(self.timeline().total_s), self.program.pipeline
        title = f"{self.model_name} on {self.program.whole_mesh} ({self.hardware.name}), predicted step {predicted}"
        title += f"\n{pipeline.described}" if pipeline is not None else ""
        table = Table(title=title, caption="\n".join(self.notes) or None, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for name in ("parameter", "shape", "layout"):
            table.add_column(name, overflow="fold")
        table.add_column("bytes/rank", justify="right", no_wrap=True)
        rows: dict[tuple, list[TensorInfo]] = {}
        for name, node in self.program.parameters().items():
            layout, value = facts(node).layout, facts(node).value
            rows.setdefault((fold_name(name), value.shape, layout), []).append(value)
        for (name, shape, layout), values in rows.items():
            held = sum(cost.local_bytes(value, layout) for value in values)
            shown = name if len(values) == 1 else f"{name} x{len(values)}"
            table.add_row(shown, f"{short_dtype(values[0].dtype)}{list(shape)}", shown_layout(layout, self.mesh), human_bytes(held))
        table.add_section()
        for share in stage_shares(self.program, cost):
            table.add_row(share.name, "", share.modules, human_bytes(share.parameter_bytes))
        table.add_section()
        for collective, count in self.stats["wire_bytes_per_step"].items():
            table.add_row(f"sent per step by {collective}", "", "", human_bytes(count))
        return table

    def report(
        self, path: str | Path = "report.html", memory: bool = False, alternatives: bool | Sequence[str] = False, other: Plan | None = None
    ) -> Path:
        """Write one HTML file, to be opened without network: words, tables, charts and pictures of this plan. Returns its path.

        memory: with the memory of a rank over the step, which takes seconds. alternatives: templates to solve for and to price beside
        this plan, a search each, or True for all. other: a plan to compare with. The graph is drawn by Graphviz's `dot` if there is one.
        Raises InputError for unknown templates and for a path that cannot be written.
        """
        from autoshard.report import write

        return write(self, path, memory, alternatives, other)

    def _repr_html_(self) -> str:
        from autoshard.report import notebook_html

        return notebook_html(self)

    def __repr__(self) -> str:
        return f"Plan({self.model_name} on {self.program.whole_mesh}, {self.template}, {len(self.program.graph.nodes)} nodes)"

    # -------------------------------------------------------------------------------------------------- to keep and run

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        extra = {name: getattr(self, name) for name in ("model_name", "inputs", "outputs", "template")}
        Path(path).write_text(
            plan_file.dumps(self.program, {**extra, "constraints": dict(self.constraints), "hardware": self.hardware.to_dict()})
        )

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan. Nothing that the file says is executed. Raises PlanError for a file that is no sound plan."""
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the plan {path}: {error}") from error
        program, body = plan_file.loads(text)
        from autoshard.passes import EmitPrograms

        try:
            program.leaves_whole = body["outputs"] == "whole"
            check(program)
            if program.pipeline is not None:
                program.stages = stage_programs(program)
                check(program)
            hardware = Hardware.from_dict(body["hardware"])
            plan = cls(program, hardware, body["model_name"], body["inputs"], body["outputs"], body["template"], body["constraints"])
            EmitPrograms(plan.model_name)(program)
        except AutoshardError:
            raise
        except Exception as error:  # whatever a graph from a file provokes
            raise PlanError(f"the plan {path} does not describe a program: {type(error).__name__}: {error}") from error
        check_source(program.source)
        return plan

    def emit(self, folder: str | Path) -> Path:
        """Write a folder that `torchrun --nproc-per-node N folder/run.py` runs: program, runtime, launcher, plan.json.

        The program is program.py, or with pipeline stages stage_0.py, stage_1.py, ... Other files that stand there are left alone.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        texts = {f"stage_{number}.py": stage.source for number, stage in enumerate(self.program.stages)}
        for name, text in (texts or {"program.py": self.program.source}).items():
            (folder / name).write_text(text)
        shutil.copytree(_HERE / "runtime", folder / "autoshard_runtime", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(_HERE / "launcher.py", folder / "run.py")
        self.save(folder / "plan.json")
        return folder

    def sizes_of(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """The sizes that may change, for arguments of global `shapes` by input name. Raises InputError where the plan does not hold."""
        sizes = sizes_of(self.program, shapes)
        check_sizes(self.program, sizes)
        return sizes

    def check_model(self, model: nn.Module) -> None:
        """Raise PlanError unless `model` has the parameters and buffers that this plan was made for."""
        own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
        planned = {
            facts(n).name: facts(n) for n in self.program.nodes("parameter", "buffer") if facts(n).name not in self.program.constants
        }
        wrong = [f"{name} {list(known.value.shape)} is missing" for name, known in planned.items() if name not in own]
        for name, known in planned.items():
            if name in own and (tuple(own[name].shape), own[name].dtype) != (known.value.shape, known.value.dtype):
                has = f"{short_dtype(own[name].dtype)}{list(own[name].shape)}"
                wrong.append(f"{name} is {has} in the model, {short_dtype(known.value.dtype)}{list(known.value.shape)} in the plan")
        extra = [n for n, p in model.named_parameters() if n not in planned and self.program.aliases.get(n, n) not in planned]
        wrong += [f"{name} is not in the plan" for name in extra]
        if wrong:
            raise PlanError(
                f"this plan was made for another {self.model_name}: " + "; ".join(wrong[:5]) + ("; ..." if len(wrong) > 5 else "")
            )

    def apply(self, model: nn.Module, mesh: DeviceMesh) -> ShardedModule:
        """Shard `model` over the processes of `mesh` as planned. Raises PlanError for another model or mesh."""
        from autoshard.module import ShardedModule
        from autoshard.planner import Settings

        given, planned = MeshSpec.of(mesh), self.program.whole_mesh
        if given != planned:
            raise PlanError(f"this plan is for mesh {planned}, not {given}; plan again for that mesh")
        self.check_model(model)
        asked: dict[str, Any] = {"inputs": self.inputs, "outputs": self.outputs, "template": self.template}
        dynamic = leaf_marks(self.program)
        overlaps = any(True for _ in self.program.nodes("start"))
        if self.program.pipeline is not None:
            asked["pipeline"] = self.program.pipeline.asked
        settings = Settings(hardware=self.hardware, constraints=dict(self.constraints), dynamic=dynamic, overlap=overlaps, **asked)
        sharded = ShardedModule(model, mesh, settings)
        sharded.adopt(self)
        return sharded
