"""The compiled model: an nn.Module whose parameters are DTensors and whose forward runs the emitted program.

One program is made per mode, input shapes and set of trainable parameters, at the first call that needs it. The first one
decides where parameters rest; later ones are planned with those layouts given.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from autoshard import gradient_norms, runtime
from autoshard.agreement import agree, content, generators, sample
from autoshard.autocast import ambient
from autoshard.call_keys import described, family_of, leaf_key, may_be
from autoshard.checkpoint import checkpointable
from autoshard.dtensors import layout_of, torch_placements
from autoshard.dynamic_dims import Marks, marks_of, without_short
from autoshard.errors import InputError, PlanError
from autoshard.loaded_program import LoadedProgram, load_program
from autoshard.mesh import PIPELINE_AXIS, MeshSpec, check_mesh, group_of_all, mesh_of_stage
from autoshard.module_state import State, slots_of
from autoshard.other_stages import (
    all_parameters,
    changed_alone,
    drop_other_stages,
    follow_dtypes,
    told_to_freeze_before,
    trained_everywhere,
)
from autoshard.pipeline_timeline import PipelineEvent
from autoshard.pipelined_program import PipelinedProgram
from autoshard.placements import I, Layout, R, shard
from autoshard.plan import Plan
from autoshard.plan_file import digest
from autoshard.planner import Request, Settings, batch_axes, entry_layout, make_plan
from autoshard.program import baked_values, facts
from autoshard.stage_simulator import parameters_of
from autoshard.torch_internals import let_segments_be_read, local_of, pytree

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class ShardedModule(nn.Module):
    """What autoshard.compile returns. Parameters and buffers carry the model's own names; `plan` is the latest plan."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh, settings: Settings) -> None:
        super().__init__()
        spec = MeshSpec.of(mesh)
        check_mesh(mesh, spec)
        let_segments_be_read()
        object.__setattr__(self, "_state", State(model, mesh_of_stage(mesh), spec.of_stage, settings, mesh, spec))
        self._mirror(model, model.named_modules(remove_duplicate=False))

    def _mirror(self, model: nn.Module, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """Modules like the model's, of the same names, that hold its parameters as DTensors and its buffers."""
        mirrors: dict[int, nn.Module] = {id(model): self}
        tensors: dict[int, Any] = {}
        for path, module in modules:
            is_new = id(module) not in mirrors
            mirror = mirrors.setdefault(id(module), type(module)() if type(module) in _CONTAINERS else nn.Module())
            if path:
                self.get_submodule(path.rpartition(".")[0]).add_module(path.rpartition(".")[2], mirror)
            if not is_new and path:
                continue
            mirror.training = module.training
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if id(parameter) not in tensors:
                    tensors[id(parameter)] = self._replicated(parameter)
                mirror.register_parameter(name, tensors[id(parameter)])
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
                if id(buffer) not in tensors:
                    tensors[id(buffer)] = buffer.detach().clone() if buffer.is_meta else buffer.detach().to(self._state.device, copy=True)
                mirror.register_buffer(name, tensors[id(buffer)], persistent=name not in module._non_persistent_buffers_set)

    def _replicated(self, original: torch.Tensor) -> nn.Parameter:
        state, local = self._state, original.detach()
        local = local if local.is_meta else local.to(state.device)
        replicated = DTensor.from_local(local, state.mesh, [Replicate()] * state.spec.ndim, run_check=False)
        return nn.Parameter(replicated, requires_grad=original.requires_grad)

    _state: State

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_state" not in self.__dict__:
                raise
            found = getattr(self._state.source, name)  # the model's own attributes, e.g. config
            if isinstance(found, (nn.Module, torch.Tensor)):
                raise
            return found

    @property
    def plan(self) -> Plan:
        """The plan of the latest call. Raises PlanError before there is one."""
        if self._state.plan is None:
            raise PlanError("there is no plan before the first call; pass example_inputs to autoshard.compile to plan at once")
        return self._state.plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, ready, sizes = self._ready(args, kwargs)
        if not ready.is_checked:
            self._check_inputs(leaves)
            ready.is_checked = True
        self._state.plan = ready.plan
        if ready.is_random:
            self._state.advance()
        return ready(leaves, self._state.mesh, sizes)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As nn.Module.compile; with pipeline stages, the forward pass of each stage is compiled by itself."""
        if self._state.whole_mesh is self._state.mesh:
            super().compile(*args, **kwargs)
            return
        if args:
            raise PlanError("pass the options of torch.compile by name")
        self._state.compiled = kwargs
        self._state.ready.clear()

    def measure(self, *args: Any, **kwargs: Any) -> list[PipelineEvent]:
        """Run one training step of a model with pipeline stages and say what every rank of `pp` ran when; no gradient is kept.

        Lay it over the prediction: `model.plan.timeline().to_chrome_trace(path, measured=model.measure(x, y))`.
        """
        leaves, ready, _ = self._ready(args, kwargs)
        if not isinstance(ready, PipelinedProgram):
            raise PlanError("only steps of models with pipeline stages are measured; profile others with torch.profiler")
        self._state.advance()
        return ready.measure(leaves)

    def prepare(self, *args: Any, **kwargs: Any) -> Plan:
        """Plan for arguments like these, without running; parameters move to where the plan wants them."""
        _, ready, _ = self._ready(args, kwargs)
        self._state.plan = ready.plan
        return ready.plan

    def _ready(self, args: tuple, kwargs: dict) -> tuple[list[Any], LoadedProgram | PipelinedProgram, Mapping[str, int]]:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        state = self._state
        self._look_up()
        modes = tuple([module.training for module in state.members])
        alone, trained = changed_alone(state), tuple(trained_everywhere(state).values())
        keys = tuple([leaf_key(leaf) for leaf in leaves])
        marks: Marks = ()
        if state.settings.dynamic is not None:
            if (str(spec), keys) not in state.marks:
                state.marks[str(spec), keys] = self._marks(args, kwargs, leaves)
            marks = state.marks[str(spec), keys]
        key = (str(spec), family_of(keys, marks), modes, trained, ambient())
        if alone and torch.is_grad_enabled():
            self._refuse(alone[0], key)
        if key not in state.ready:
            with torch.inference_mode(False):  # what is made now serves training later
                state.ready[key] = self._prepare(args, kwargs, leaves, keys, marks)
        ready = state.ready[key]
        if marks and keys not in ready.sizes:
            self._admit(ready, leaves, keys)
        return leaves, ready, ready.sizes[keys] if marks else {}

    def _refuse(self, name: str, key: tuple) -> None:
        """Let this call end on all ranks, whose calls are as before, because `name` was frozen or thawed here."""
        error, ready = told_to_freeze_before(name), self._state.ready.get(key)
        if isinstance(ready, PipelinedProgram):
            ready.fail(error)
        else:  # the others agree on what to plan now
            self._agree({}, error)

    def _look_up(self) -> None:
        """Find out once where every parameter and buffer is held."""
        if not self._state.slots:
            absent = {name: (self._state.absent, name) for name in self._state.absent}
            self._state.members, self._state.slots = tuple(self.modules()), {**slots_of(self), **absent}

    @torch.compiler.disable
    def _marks(self, args: tuple, kwargs: dict, leaves: list[Any]) -> Marks:
        """Dims of this call whose sizes may change; those of length 0 and 1 are planned for as they are."""
        try:
            examples = [self._global_example(leaf) for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(examples, pytree.tree_structure((args, kwargs)))
            marks = without_short(marks_of(self._state.source, self._state.settings.dynamic, args, kwargs), examples)
        except Exception as error:  # told to the ranks that wait to agree on this call
            self._agree({}, error)
            raise
        return marks if any(marks) else ()

    @torch.compiler.disable
    def _admit(self, ready: LoadedProgram | PipelinedProgram, leaves: list[Any], key: tuple) -> None:
        """Before the first step at new sizes: the plan holds there, and all ranks have the same."""
        failure: Exception | None = None
        sizes: dict[str, int] = {}
        try:
            sizes = ready.plan.sizes_of(self._shapes(ready.plan, leaves))
        except Exception as error:  # whatever stops one rank must stop the others too
            failure = error
        self._agree({"shapes of arguments": str([tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor)])}, failure)
        ready.sizes[key] = sizes

    def _shapes(self, plan: Plan, leaves: list[Any]) -> dict[str, tuple[int, ...]]:
        """Global shapes of arguments by input name."""
        named = zip(plan.program.flat_inputs, leaves, strict=True)
        return {name: tuple(self._global_example(leaf).shape) for name, leaf in named if name is not None}

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """As nn.Module.parameters. On a rank whose pipeline stages have no weights, the emptied ones of others: optimizers want some."""
        own = list(super().parameters(recurse))
        others = {id(each): each for each in self._state.absent.values() if isinstance(each, nn.Parameter)} if recurse else {}
        yield from own or others.values()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module.state_dict: DTensors that share memory with the parameters, and that torch.distributed.checkpoint understands."""
        return checkpointable(super().state_dict(*args, **kwargs))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As nn.Module.load_state_dict; plain tensors are global values, each rank keeps its part. Nothing is half loaded."""
        own = self.state_dict()
        foreign = [name for name, value in state_dict.items() if isinstance(value, DTensor) and value.device_mesh != self._state.mesh]
        if foreign and self._state.stages is not None:
            raise PlanError(
                f"{foreign[0]} lies on another mesh than the pipeline stage that holds it; save with torch.distributed.checkpoint and load "
                "that, or pass plain tensors"
            )
        state_dict = {name: value for name, value in state_dict.items() if name not in self._state.absent}
        faults = [
            f"{k} is {tuple(v.shape)}, the model has {tuple(own[k].shape)}"
            for k, v in state_dict.items()
            if k in own and v.shape != own[k].shape
        ]
        if strict:
            faults += [f"{name} is missing" for name in own if name not in state_dict]
            faults += [f"{name} is not in the model" for name in state_dict if name not in own]
        if faults:
            shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
            raise PlanError(f"cannot load this state dict, nothing was changed: {shown}")
        with torch.no_grad():
            given = {name: self._distributed(name, value) for name, value in state_dict.items()}
            result = super().load_state_dict(given, strict=strict, assign=assign)
        self._state.forget_constants()
        return result

    def materialize(
        self, value_of: Callable[[str], torch.Tensor] | Mapping[str, torch.Tensor], device: torch.device | str | None = None
    ) -> ShardedModule:
        """Give memory to a model that was compiled on the meta device.

        value_of: the global value of a parameter or buffer by name, asked for one at a time; every rank keeps its part
        and drops the rest, so that no rank ever holds the whole model. Raises PlanError before there is a plan.
        """
        if self._state.layouts is None:
            raise PlanError(
                "plan before materialize, so that each rank keeps its part only: pass example_inputs to autoshard.compile, or call prepare"
            )
        get = value_of.__getitem__ if isinstance(value_of, Mapping) else value_of
        place = torch.device(device) if device is not None else self._state.device
        done: set[int] = set()
        with torch.no_grad():
            for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
                if id(tensor) in done:
                    continue
                done.add(id(tensor))
                whole = get(name).to(tensor.dtype)
                if whole.shape != tensor.shape:
                    raise PlanError(f"{name} is {tuple(tensor.shape)}, the value given for it {tuple(whole.shape)}")
                if isinstance(tensor, DTensor):
                    local = self._piece(name, whole).to(place)
                    torch.utils.swap_tensors(tensor, self._wrapped(local, tensor))
                else:
                    torch.utils.swap_tensors(tensor, whole.to(place, copy=True))
        self._state.forget_constants()
        return self

    def adopt(self, plan: Plan) -> None:
        """Put parameters where `plan` wants them and keep its program for calls that it fits."""
        self._look_up()
        self._shard_parameters(plan)
        self._state.plan = plan
        self._state.adopted.append(plan)

    # ---------------------------------------------------------------------------------------------------------- inside

    def _apply(self, fn: Callable, recurse: bool = True) -> ShardedModule:
        result = super()._apply(fn, recurse)
        originals = {**dict(self._state.source.named_parameters()), **dict(self._state.source.named_buffers())}
        for name, mine in [*self.named_parameters(), *self.named_buffers()]:
            original = originals[name]
            if mine.dtype != original.dtype:  # programs are traced with dtypes
                original.data = original.data.to(mine.dtype)
                self._state.ready.clear()
        if self._state.stages is not None:
            follow_dtypes(self._state, [*self.named_parameters(), *self.named_buffers()], originals)
        self._state.forget_constants()
        return result

    def _layout(self, name: str) -> Layout:
        layouts = self._state.layouts or {}
        return layouts.get(self._state.aliases.get(name, name), (I,) * self._state.spec.ndim)

    def _piece(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        return shard(whole, self._layout(name), self._state.spec, self._state.coordinate).contiguous().clone()

    def _wrapped(self, local: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
        assert isinstance(like, DTensor)
        new = DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
        return nn.Parameter(new, requires_grad=like.requires_grad)

    def _distributed(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A global value, or a DTensor of any layout, as a DTensor that lies like the parameter `name`."""
        target: Any = dict(self.named_parameters(remove_duplicate=False)).get(name)
        if target is None:
            return value
        if isinstance(value, DTensor):
            if value.device_mesh == target.device_mesh and value.placements == target.placements:
                return value
            value = value.full_tensor()
        return self._wrapped(self._piece(name, value.detach()).to(target.to_local().device, target.dtype), target)

    def _shard_parameters(self, plan: Plan) -> None:
        """Swap replicated parameters for the planned shards, keeping the Parameter objects that optimizers hold."""
        state = self._state
        if state.layouts is not None:
            return
        state.layouts = {name: tuple(I if p == R else p for p in layout) for name, layout in plan.parameter_layouts.items()}
        state.aliases = plan.program.aliases
        mesh = state.mesh
        parameters: list[tuple[str, Any]] = list(self.named_parameters())
        for name, parameter in parameters:
            layout = self._layout(name)
            if all(p.is_whole for p in layout):
                continue
            local = self._piece(name, parameter.to_local().detach())
            new = DTensor.from_local(
                local, mesh, torch_placements(layout), run_check=False, shape=parameter.shape, stride=parameter.stride()
            )
            torch.utils.swap_tensors(parameter, nn.Parameter(new, requires_grad=parameter.requires_grad))
        if plan.program.pipeline is not None:
            state.stages, state.stage_ranks = parameters_of(plan.program), plan.program.pipeline.stage_ranks
            drop_other_stages(state, plan)
            state.trained = {name: owner[leaf].requires_grad for name, (owner, leaf) in state.slots.items()}

    @torch.compiler.disable
    def _prepare(self, args: tuple, kwargs: dict, leaves: list[Any], key: tuple, marks: Marks) -> LoadedProgram | PipelinedProgram:
        """Plan, agree with the other ranks that all run the same program, and load it."""
        state, plan = self._state, None
        failure: Exception | None = None
        sizes: dict[str, int] = {}
        try:
            held = [name for name, parameter in self.named_parameters() if weakref.getweakrefcount(parameter)]
            if held and state.layouts is None:
                raise PlanError(
                    f"{held[0]} cannot move to its shards any more, torch.compile or other code holds a weak reference to it; "
                    "plan before that: pass example_inputs to autoshard.compile"
                )
            originals = dict(state.source.named_parameters())
            trained = trained_everywhere(state)
            for name, _ in all_parameters(state):
                originals[name].requires_grad_(trained[name])
            for mine, theirs in zip(self.modules(), state.source.modules(), strict=True):
                theirs.training = mine.training
            plan = next((p for p in state.adopted if self._fits(p, args, kwargs, leaves)), None) or self._plan(args, kwargs, leaves, marks)
            sizes = plan.sizes_of(self._shapes(plan, leaves))
        except Exception as error:  # whatever stops one rank must stop the others too
            failure = error
        shapes = str([tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor)])
        self._agree(
            {
                "mode": "training" if self.training else "evaluation",
                "versions": f"torch {torch.__version__}",
                "shapes of arguments": shapes,
                "program": plan.fingerprint if plan else "",
                "values of parameters": "" if state.layouts or plan is None else self._values(plan),
            },
            failure,
            plan.program.source if plan else "",
        )
        assert plan is not None
        self._shard_parameters(plan)
        ready = self._loaded(plan)
        ready.sizes[key] = sizes
        return ready

    def _loaded(self, plan: Plan) -> LoadedProgram | PipelinedProgram:
        state = self._state
        if plan.program.pipeline is None:
            return LoadedProgram(plan, load_program(plan, self._axes(), self._tensor, state.device, state.next_seed), self._held)
        if plan.program.is_training and state.microbatches is None:
            state.microbatches = plan.program.pipeline.microbatches
        group = state.whole_mesh.get_group(PIPELINE_AXIS)
        everyone = group_of_all(state.whole_mesh)
        found = PipelinedProgram(plan, self._axes(), self._held, state.device, state.next_seed, group, everyone, state.compiled)
        gradient_norms.register(self, state.mesh, group, found.repeated)
        return found

    def _values(self, plan: Plan) -> str:
        """Digest of parameters, buffers and constants, of some thousand numbers of each."""
        tensors = [*self.parameters(), *self.buffers(), *plan.program.constants.values()]
        return digest([sample(local_of(tensor)) for tensor in tensors if not tensor.is_meta])[:12]

    def _plan(self, args: tuple, kwargs: dict, leaves: list[Any], marks: Marks) -> Plan:
        state, settings = self._state, self._state.settings
        if settings.pipeline.microbatches is None and state.microbatches is not None:
            settings = replace(settings, pipeline=replace(settings.pipeline, microbatches=state.microbatches))
        layouts = [self._entry(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
        examples = [self._global_example(leaf) for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(examples, pytree.tree_structure((args, kwargs)))
        request = Request(
            state.source,
            args,
            kwargs,
            state.whole_spec,
            settings,
            device=state.device.type,
            entry_layouts=tuple(layouts),
            fixed_parameters=state.layouts or {},
            dynamic=marks,
            fixed_stages=state.stages or {},
            stage_ranks=state.stage_ranks,
        )
        return make_plan(request)

    def _fits(self, plan: Plan, args: tuple, kwargs: dict, leaves: list[Any]) -> bool:
        """Whether a plan that was made elsewhere is for this mode, structure, constants, shapes, layouts and trainable parameters."""
        program = plan.program
        if program.is_training != self.training or str(program.in_spec) != str(pytree.tree_structure((args, kwargs))):
            return False
        if program.baked != baked_values(leaves, self):
            return False
        trained = trained_everywhere(self._state)
        if any(facts(node).needs_grad != trained[name] for name, node in program.parameters().items()):
            return False
        given = [(described(self._global_example(leaf)), self._entry(leaf)) for leaf in leaves if isinstance(leaf, torch.Tensor)]
        inputs = program.given()
        wanted = [(inputs[name].value, inputs[name].layout) for name in program.flat_inputs if name is not None]
        return len(given) == len(wanted) and all(
            layout == other and may_be(value, info) for (info, layout), (value, other) in zip(given, wanted, strict=True)
        )

    def _entry(self, leaf: torch.Tensor) -> Layout:
        if isinstance(leaf, DTensor):
            return layout_of(leaf, leaf.requires_grad)
        return entry_layout(leaf, self._state.spec, self._state.settings.inputs)

    def _global_example(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        shape = list(leaf.shape)
        if not isinstance(leaf, DTensor) and self._state.settings.inputs == "local" and leaf.dim():
            for axis in batch_axes(self._state.spec):
                shape[0] *= self._state.spec.shape[self._state.spec.index(axis)]
        return torch.empty(shape, dtype=leaf.dtype, device="meta", requires_grad=leaf.requires_grad)

    @torch.compiler.disable
    def _check_inputs(self, leaves: list[Any]) -> None:
        """At the first step of a program: arguments lie where they should, and plain ones are equal on all ranks."""
        failure: Exception | None = None
        without_memory = [name for name, tensor in [*self.named_parameters(), *self.named_buffers()] if tensor.is_meta]
        if without_memory:
            failure = InputError(
                f"{without_memory[0]} and {len(without_memory) - 1} more are on the meta device; call materialize before the first step"
            )
        for leaf in leaves:
            if isinstance(leaf, DTensor) and self._state.whole_mesh is not self._state.mesh:
                failure = InputError("a DTensor argument cannot go into pipeline stages; pass plain tensors, the whole batch on every rank")
            elif isinstance(leaf, DTensor) and leaf.device_mesh != self._state.mesh:
                failure = InputError(f"a DTensor argument lies on {leaf.device_mesh}, the model on {self._state.mesh}")
            if isinstance(leaf, torch.Tensor) and leaf.device.type != self._state.device.type:
                failure = InputError(f"an argument is on {leaf.device}, the model on {self._state.device}; move it there first")
        plain = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, DTensor)]
        is_local = self._state.settings.inputs == "local"
        parts = [self._state.coordinate[self._state.spec.index(axis)] for axis in batch_axes(self._state.spec)] if is_local else []
        values = str([content(leaf) for leaf in plain]) if failure is None else ""
        compared = {f"values of arguments{' of part ' + str(parts) if parts else ''}": values}
        if self._state.settings.randomness == "single_device":
            compared["state of the random generator"] = generators(self._state.device)
        self._agree(compared, failure)

    def _agree(self, mine: Mapping[str, str], failure: Exception | None, text: str = "") -> None:
        agree(self._state.exchange, mine, failure, text)

    def _axes(self) -> tuple[runtime.Axis, ...]:
        state = self._state
        axes = zip(state.spec.axes, state.spec.shape, state.coordinate, strict=True)
        return tuple(runtime.Axis(name, size, rank, state.mesh.get_group(name).group_name) for name, size, rank in axes)

    def _held(self, name: str) -> torch.Tensor:
        owner, leaf = self._state.slots[name]
        return owner[leaf]

    def _tensor(self, name: str) -> torch.Tensor:
        return local_of(self._held(name))
