"""A plan with pipeline stages, loaded on a rank: one call of the model is one run of the schedule.

In training, forward and backward of all microbatches run inside the call of the model; the gradients are kept by the loss that it
returns, and `loss.backward()` adds them, scaled by what arrives there, to `.grad` of the parameters. So the training loop is that
of a model without stages, accumulation over several calls included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.distributed.tensor import DTensor

from autoshard import gradient_scaling, runtime
from autoshard.errors import PlanError
from autoshard.loaded_program import load_text
from autoshard.ops.row import TensorInfo
from autoshard.pipeline import Pipeline
from autoshard.pipeline_timeline import PipelineEvent
from autoshard.placements import local_shape
from autoshard.program import Facts, Program, facts, producer
from autoshard.runtime.microbatches import joined, of_microbatch
from autoshard.runtime.pipeline_engine import EngineStage, PipelineEngine
from autoshard.runtime.stage_program import StageProgram, add_tied, tied_groups
from autoshard.stage_simulator import parameters_of
from autoshard.stages import given_to_forward, given_to_prepare
from autoshard.torch_internals import local_of, pytree

if TYPE_CHECKING:
    from autoshard.plan import Plan


class PipelinedProgram:
    """A plan with its stages loaded on this rank. group: the ranks of `pp` that share this rank's place on the other axes."""

    def __init__(
        self,
        plan: Plan,
        axes: tuple[runtime.Axis, ...],
        slots: Callable[[str], Tensor],
        device: torch.device,
        seed: Callable[[], int],
        group: dist.ProcessGroup,
        everyone: dist.ProcessGroup,
        compiled: Mapping[str, Any] | None = None,
    ) -> None:
        """everyone: all ranks of the mesh. compiled: options of torch.compile for forward of every stage; None: run it as it is."""
        self._begin(plan.program, dist.get_rank(group), slots, device, seed)
        self.plan, self.group, self.is_checked = plan, group, False
        self.sizes: dict[tuple, dict[str, int]] = {}
        gradient_scaling.watch()
        self.is_random = any(facts(node).random_axes is not None for node in plan.program.nodes("op"))
        read = {facts(node).name for k in self.mine for node in plan.program.stages[k].nodes("buffer")}
        constants = {name: value.to(device) for name, value in plan.program.constants.items() if name in read}

        def tensor(name: str) -> Tensor:
            return constants[name] if name in constants else self.read(name)

        def load(number: int, text: str) -> Any:
            return load_text(text, f"{plan.model_name} stage {number}", axes, tensor, device, seed)

        self._load(load)
        if compiled is not None:
            if any(action.kind in "IW" for own in self.pipeline.schedule for action in own):
                raise PlanError(
                    f"schedule {self.pipeline.name!r} splits backward, which torch.compile cannot; ask for another, such as '1f1b'"
                )
            for stage in self.stages:
                stage.code.forward = torch.compile(stage.code.forward, **compiled)
        held = parameters_of(plan.program)
        self.repeated = [n for n, stages in held.items() if self.rank in self._ranks(stages) and self.rank != min(self._ranks(stages))]
        self.tied = tied_groups(held, self.pipeline.stage_ranks, group)
        parts = [self._engine_stage(stage) for stage in self.stages]
        self.engine = PipelineEngine(parts, self.pipeline.stage_ranks, self.pipeline.microbatches, group, device, everyone)

    def _begin(self, program: Program, rank: int, slots: Callable[[str], Tensor], device: torch.device, seed: Callable[[], int]) -> None:
        """What needs no other rank. rank: along `pp`."""
        assert program.pipeline is not None
        self.program, self.rank, self.slots, self.device, self.seed = program, rank, slots, device, seed
        self.pipeline: Pipeline = program.pipeline
        self.last = self.pipeline.stage_ranks[-1]
        self.mine = [number for number, at in enumerate(self.pipeline.stage_ranks) if at == rank]
        self.held = [name for name, stages in parameters_of(program).items() if set(stages) & set(self.mine)]
        self.leaves: dict[str, Tensor] = {}
        self.inputs: Mapping[str, Tensor] = {}

    def _load(self, load: Callable[[int, str], Any]) -> None:
        """load: from the number of a stage and its text to an instance of what that defines."""
        parts = [(number, self.program.stages[number]) for number in self.mine]
        self.stages = [_stage(number, part, load(number, part.source)) for number, part in parts]

    def read(self, name: str) -> Tensor:
        """A parameter or buffer as stages read it: in a training step the leaf that stands for it."""
        return self.leaves[name] if name in self.leaves else local_of(self.slots(name))

    def _ranks(self, stages: Sequence[int]) -> tuple[int, ...]:
        return tuple(sorted({self.pipeline.stage_ranks[stage] for stage in stages}))

    def _engine_stage(self, stage: StageProgram) -> EngineStage:
        program = self.program.stages[stage.number]
        received = tuple(self._example(facts(node)) for node in program.nodes("received"))
        results = [node for node in program.output.args[0] if isinstance(node, fx.Node)]  # type: ignore[union-attr]
        sent = tuple(self._example(facts(producer(node)[0]), producer(node)[1]) for node in results)

        def forward(values: tuple[Tensor, ...], number: int) -> tuple[Tensor, ...]:
            return stage.forward(values, of_microbatch(self.pipeline, self.inputs, number, self.device), number, self.seed)

        return EngineStage(stage.number, forward, received, sent, stage.code.SPLITS_BACKWARD)

    def _example(self, known: Facts, index: int = 0) -> Tensor:
        value: TensorInfo = known.values[index]
        shape = local_shape(value.shape, known.layouts[index], self.program.mesh.shape)
        return torch.empty(tuple(shape or ()), dtype=value.dtype, device="meta", requires_grad=value.needs_grad)

    # ------------------------------------------------------------------------------------------------------ one call

    def __call__(self, leaves: list[Any], *_: Any) -> Any:
        named = zip(self.program.flat_inputs, leaves, strict=True)
        self.inputs = {name: leaf for name, leaf in named if name is not None}
        try:
            trains = torch.is_grad_enabled() and self.program.is_training
            needing = [name for name, leaf in self.inputs.items() if trains and leaf.requires_grad]
            if needing:
                raise PlanError(f"the argument {needing[0]} needs a gradient, which pipeline stages do not give; pass it detached")
            if trains and self.pipeline.loss is None:
                raise PlanError(_NO_LOSS)
            return self._train() if torch.is_grad_enabled() and self.pipeline.loss is not None else self._evaluate()
        finally:
            self.inputs, self.leaves = {}, {}

    def measure(self, leaves: list[Any]) -> list[PipelineEvent]:
        """What every rank of `pp` runs when in one training step, whose gradients nobody gets."""
        named = zip(self.program.flat_inputs, leaves, strict=True)
        self.inputs = {name: leaf for name, leaf in named if name is not None}
        if self.pipeline.loss is None:
            raise PlanError(_NO_LOSS)
        try:
            self._hold()
            self._prepare()
            events = self.engine.measure(self.pipeline.schedule, self._tensor_number(self.pipeline.loss))
            return [PipelineEvent(*event) for event in events]
        finally:
            self.inputs, self.leaves = {}, {}

    def fail(self, error: Exception) -> None:
        """Let the next call end on all ranks with what this rank found wrong."""
        self.engine.fail(error)

    def _hold(self) -> dict[str, Tensor]:
        """Make the leaves of this step; returns the parameters that they stand for."""
        trained = {name: self.slots(name) for name in self.held if self.slots(name).requires_grad}
        hooked = [name for name, held in trained.items() if held._backward_hooks or getattr(held, "_post_accumulate_grad_hooks", None)]
        if hooked:
            text = f"{hooked[0]} has a gradient hook, which pipeline stages would not call; use its .grad after backward instead"
            self.fail(PlanError(text))
        self.leaves = {name: local_of(held).detach().requires_grad_() for name, held in trained.items()}
        return trained

    def _evaluate(self) -> Any:
        with torch.no_grad():
            self._prepare()
            results = self.engine.evaluate()
            return self._returned(self._everywhere(results, range(len(self.pipeline.results))))

    def _train(self) -> Any:
        assert self.pipeline.loss is not None
        trained = self._hold()
        self._prepare()
        results = self.engine.train(self.pipeline.schedule, self._tensor_number(self.pipeline.loss))
        self._reduce()
        gradients = [(trained[name], leaf.grad) for name, leaf in self.leaves.items() if leaf.grad is not None]
        values = self._everywhere(results, [self.pipeline.loss])
        loss = values[self.pipeline.loss]
        for k, node in enumerate(self.program.output.args[0]):  # type: ignore[arg-type]
            if isinstance(node, fx.Node) and k != self.pipeline.loss and facts(producer(node)[0]).needs_grad:
                values[k] = _Apart.apply(values[k].detach().requires_grad_()) if values[k].is_floating_point() else values[k]
        values[self.pipeline.loss] = _Loss.apply(loss.detach().requires_grad_(), _Gradients(gradients, self.group))
        return self._returned(values)

    def _prepare(self) -> None:
        whole = {name: self.inputs[argument] for name, (argument, dim) in self.pipeline.inputs.items() if dim is None}
        try:
            for stage in self.stages:
                stage.prepare(whole, self.seed)
        except Exception as error:  # the other ranks learn of it at the end of the step
            self.fail(error)

    def _reduce(self) -> None:
        for stage in self.stages:
            stage.reduce()
        add_tied(self.leaves, self.tied)

    def _tensor_number(self, result: int) -> int:
        """The number of a result among those that are tensors."""
        nodes = list(self.program.output.args[0])  # type: ignore[arg-type]
        return sum(isinstance(node, fx.Node) for node in nodes[:result])

    def _everywhere(self, results: Sequence[tuple[Tensor, ...]], wanted: Sequence[int]) -> list[Any]:
        """The results of the whole batch; those of `wanted` on every rank, others where the last stage runs and as shapes elsewhere."""
        nodes = list(self.program.output.args[0])  # type: ignore[arg-type]
        constants = [None if isinstance(node, fx.Node) else node for node in nodes]
        if self.rank == self.last:
            filled = [self._filled(constants, nodes, values) for values in results]
            found = joined(self.pipeline, filled)
        else:
            found = [self._shape(node, how) for node, how in zip(nodes, self.pipeline.results, strict=True)]
        for k in wanted:
            if isinstance(nodes[k], fx.Node):
                value = found[k].contiguous() if self.rank == self.last else torch.empty_like(found[k], device=self.device)
                self._broadcast(value)
                found[k] = value
        return found

    def _broadcast(self, value: Tensor) -> None:
        """Give all ranks of `pp` what the last stage's has."""
        dist.broadcast(value, dist.get_global_rank(self.group, self.last), group=self.group)

    @staticmethod
    def _filled(constants: Sequence[Any], nodes: Sequence[Any], values: Sequence[Tensor]) -> list[Any]:
        order = iter(values)
        return [next(order) if isinstance(node, fx.Node) else constant for node, constant in zip(nodes, constants, strict=True)]

    def _shape(self, node: Any, how: Any) -> Any:
        if not isinstance(node, fx.Node):
            return node
        example = self._example(facts(producer(node)[0]), producer(node)[1]).detach()
        count = self.pipeline.microbatches
        return torch.cat([example] * count, how) if isinstance(how, int) else example

    def _returned(self, values: Sequence[Any]) -> Any:
        return pytree.tree_unflatten(list(values), self.program.out_spec)

    def forget_constants(self) -> None:
        for stage in self.stages:
            stage.code.forget_constants()


def _stage(number: int, program: Program, code: Any) -> StageProgram:
    """A stage with the names of what it is given."""
    named = (program.nodes("received"), given_to_forward(program), given_to_prepare(program))
    received, takes, wants = (tuple(facts(node).name for node in nodes) for nodes in named)
    return StageProgram(number, code, received, takes, wants)


_NO_LOSS = (
    "a pipeline needs the loss inside the model, as the backward of a microbatch starts before the last one's forward has ended. "
    "Return it from forward:\n"
    "    class WithLoss(nn.Module):\n"
    "        def __init__(self, model): super().__init__(); self.model = model\n"
    "        def forward(self, x, y): return criterion(self.model(x), y)\n"
    "    loss = compiled(x, y)   # where compiled = autoshard.compile(WithLoss(model), mesh)"
)


class _Gradients:
    """Gradients of one call, by parameter, until backward takes them. `.parts` is [] afterwards."""

    def __init__(self, parts: list[tuple[Tensor, Tensor]], group: dist.ProcessGroup) -> None:
        self.parts, self.is_taken, self.group = parts, False, group

    def release(self, scale: Tensor) -> None:
        if self.is_taken:
            raise RuntimeError("the gradients of this pipelined step were taken by an earlier backward; call the model again")
        self.is_taken = True
        parts, self.parts = self.parts, []
        is_scaled = float(scale) != 1.0
        if is_scaled and parts:
            torch._foreach_mul_([gradient for _, gradient in parts], scale)
        if is_scaled or gradient_scaling.is_used():
            self._spread_overflow([gradient for _, gradient in parts], scale)
        with torch.no_grad():
            for parameter, gradient in parts:
                _accumulate(parameter, gradient)

    def _spread_overflow(self, gradients: list[Tensor], scale: Tensor) -> None:
        """Where one stage has a gradient that is not finite, let all: a GradScaler, which looks at one alone, must skip the step on all."""
        finite = [gradient.isfinite().all() for gradient in gradients if gradient.numel()]
        overflows = torch.stack(finite).logical_not().any() if finite else torch.zeros((), dtype=torch.bool, device=scale.device)
        flag = overflows.to(torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        gradient_scaling.tell(flag)
        if bool(flag) and not bool(overflows):
            for gradient in [gradient for gradient in gradients if gradient.numel()][:1]:
                gradient[(slice(0, 1),) * gradient.dim()].fill_(float("nan"))


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    """Add a local gradient to `.grad` of a parameter."""
    if parameter.grad is not None:
        local_of(parameter.grad).add_(gradient)
    elif isinstance(parameter, DTensor):
        shape, stride = parameter.shape, parameter.stride()
        parameter.grad = DTensor.from_local(
            gradient, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
        )
    else:
        parameter.grad = gradient


class _Apart(torch.autograd.Function):
    """A result beside the loss, whose gradient nobody can have any more."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise PlanError(
            "a model with pipeline stages is differentiated from its loss alone; add up what is to be differentiated in its forward, or "
            "detach the other results"
        )


class _Loss(torch.autograd.Function):
    """The loss of a step whose backward has run: it hands over the gradients."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: _Gradients) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("a pipelined loss cannot be differentiated twice: leave out create_graph=True")
        ctx.gradients.release(grad)
        return None, None
