"""Every private name of torch that autoshard uses, each with the reason and what breaks if it moves."""

from __future__ import annotations

import contextlib
import copy
import inspect
import linecache
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

# TransformGetItemToIndex: indexing by a tensor under vmap. If it moves: score functions of flex_attention that read tables.
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

# non_strict_utils: where export makes the environment of its symbolic sizes, see record_size_guards.
from torch._export import non_strict_utils

# The pass of torch.export that makes regions of no_grad blocks: see keep_nested_no_grad.
from torch._export.passes import replace_set_grad_with_hop_pass as set_grad_pass

# FakeTensor: tracing without memory, on the device where the program will run. If it moves: trace_model cannot start.
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

# _StridedShard: DTensor's placement for "the shard's part of every segment". If it moves: segmented parameters cannot be stored.
from torch.distributed.tensor.placement_types import _StridedShard

# annotate, preserve_node_meta: marks on the nodes that a trace makes. If they move: activation checkpointing is lost in tracing.
from torch.fx import traceback as fx_traceback

# The modes of a trace, to step out of it: see untraced.
from torch.fx.experimental import proxy_tensor

# ShapeEnv, DimDynamic: integers that keep their expression, see new_symbolic_integer. If they move: symbolic costs of lowered ops.
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

# _pytree's TreeSpec text form: the public torch.utils._pytree has no public spelling yet. If it moves: Plan.save and Plan.load.
from torch.utils import _pytree as pytree
from torch.utils import checkpoint as checkpoint_module

# _disable_current_modes: nothing public leaves dispatch modes for a while. If it moves: plan.memory.
from torch.utils._python_dispatch import _disable_current_modes

from autoshard.errors import TraceError

_PACKAGE = str(Path(__file__).parent)

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "ShapeEnv",
    "_StridedShard",
    "branch_of",
    "call_flex_attention",
    "convolution_kernel",
    "fake_copy",
    "fake_mode",
    "holders",
    "is_in_backward",
    "keep_branches",
    "keep_nested_no_grad",
    "let_segments_be_read",
    "local_of",
    "new_symbolic_integer",
    "ops_seen_by_autograd",
    "outside_modes",
    "plain_ops",
    "pytree",
    "record_lost_backwards",
    "record_size_guards",
    "region_of",
    "replaced",
    "result_of",
    "running_gradient",
    "running_gradient_number",
    "spell_out_keywords",
    "tag_checkpoints",
    "untraced",
    "users_line",
]


def fake_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def new_symbolic_integer(env: ShapeEnv, name: str, hint: int) -> Any:
    """An integer of `env` that keeps its expression; `hint` is its value where one is asked for."""
    from torch._dynamo.source import ConstantSource  # imports all of dynamo

    source = ConstantSource(name)
    symbol = env.create_symbol(hint, source, DimDynamic.DYNAMIC, constraint_dim=None)
    return env.create_symintnode(symbol, hint=hint, source=source)


def fake_like(tensor: torch.Tensor, mode: FakeTensorMode, device: torch.device) -> torch.Tensor:
    """A tensor without memory of the same size and type that claims to lie on `device`."""
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    fake = FakeTensor(mode, meta, device)
    return nn.Parameter(fake, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def fake_copy(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> nn.Module:
    """A deep copy of `model` whose parameters and buffers have no memory; ties are kept."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): fake_like(tensor, mode, device) for tensor in tensors})


@contextlib.contextmanager
def record_lost_backwards(found: Callable[[str, str], Any]) -> Iterator[None]:
    """Call `found(kind, where)` for what non-strict export drops silently while the block runs.

    kind: "Tensor.register_hook", "torch.autograd.grad", or the name of a custom autograd.Function. Patches all three. If they
    move: test_errors fails.
    """
    apply, where = vars(torch.autograd.Function)["apply"], users_line

    def recording_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            found(cls.__qualname__, where())
        return apply.__get__(None, cls)(*args, **kwargs)  # a Python classmethod, or one of C

    def recording_hook(tensor: Any, hook: Any) -> Any:
        found("Tensor.register_hook", where())
        return register_hook(tensor, hook)

    def recording_grad(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("create_graph"):
            found("torch.autograd.grad", where())
        return autograd_grad(*args, **kwargs)

    register_hook, autograd_grad = torch.Tensor.register_hook, torch.autograd.grad
    torch.Tensor.register_hook, torch.autograd.grad = recording_hook, recording_grad  # type: ignore[method-assign]
    torch.autograd.Function.apply = classmethod(recording_apply)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.register_hook, torch.autograd.grad = register_hook, autograd_grad  # type: ignore[method-assign]
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]


def users_line() -> str:
    frames = [f for f in traceback.extract_stack() if not any(part in f.filename for part in ("/torch/", "/autoshard/", "/passes/"))]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown line"


_REGION, _BRANCH, _RESULT = "autoshard_region", "autoshard_branch", "autoshard_result"
# The generators that torch.utils.checkpoint runs around the function, by torch version: the second one since 2.14.
_GENERATORS = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")


@contextlib.contextmanager
def tag_checkpoints(selective: Callable[[str], Any] = lambda where: None) -> Iterator[None]:
    """While the block runs, torch.utils.checkpoint just calls its function, and nodes traced there carry the region's number.

    Tracing would drop the regions silently. A region inside another belongs to the outer one. `selective(where)` is called for
    a region with its own context_fn, which is not looked at. Patches the generators that every spelling of checkpoint runs, and
    CheckpointFunction.apply. If they move: test_regions fails.
    """
    count, module = 0, checkpoint_module
    apply = vars(module.CheckpointFunction).get("apply")  # there already where one such block stands in another
    generators = {name: getattr(module, name) for name in _GENERATORS if hasattr(module, name)}

    @contextlib.contextmanager
    def tagged() -> Iterator[None]:
        nonlocal count
        if _REGION in fx_traceback.current_meta.get("custom", {}):
            yield
            return
        count += 1
        with fx_traceback.annotate({_REGION: count}):
            yield

    def generator(*args: Any, **kwargs: Any) -> Iterator[None]:
        contexts = kwargs.get("context_fn", next((a for a in args[2:3] if callable(a)), module.noop_context_fn))
        if contexts is not module.noop_context_fn:
            selective(users_line())
        with tagged():
            yield

    def reentrant(function: Callable, preserve: bool, *args: Any) -> Any:
        with tagged():
            return function(*args)

    for name in generators:
        setattr(module, name, generator)
    module.CheckpointFunction.apply = staticmethod(reentrant)  # type: ignore[method-assign]
    try:
        with fx_traceback.preserve_node_meta():
            yield
    finally:
        for name, original in generators.items():
            setattr(module, name, original)
        if apply is None:
            del module.CheckpointFunction.apply
        else:
            module.CheckpointFunction.apply = apply  # type: ignore[method-assign]


@contextlib.contextmanager
def keep_nested_no_grad() -> Iterator[None]:
    """While the block runs, torch.export sees a no-grad region inside an autocast region, which it otherwise drops silently.

    Its pass looks for `_set_grad_enabled` as the first node of a piece of the graph, and cutting the graph has put
    `_enter_autocast` before it. If it moves: test_regions fails, such models get gradients that eager does not have.
    """
    original = set_grad_pass._is_set_grad_enabled_sub_mod
    opened = torch.amp.autocast_mode._enter_autocast

    def is_region(node: fx.Node, omit_if_same_with_ambient: bool = False) -> bool:
        if node.op != "call_module":
            return False
        inner = getattr(node.graph.owning_module, str(node.target)).graph.nodes
        first = next((n for n in inner if n.op != "placeholder" and n.target is not opened), None)
        if first is None or first.target is not torch._C._set_grad_enabled:
            return False
        return not omit_if_same_with_ambient or first.args[0] != torch.is_grad_enabled()

    set_grad_pass._is_set_grad_enabled_sub_mod = is_region
    try:
        yield
    finally:
        set_grad_pass._is_set_grad_enabled_sub_mod = original


@contextlib.contextmanager
def keep_branches() -> Iterator[None]:
    """While the block runs, torch.cond calls both of its functions, and nodes traced there carry the branch they belong to.

    Traced as torch does it, through dynamo, branches would lose module names, source lines and, silently, the backward of
    custom autograd.Functions. What the functions return is joined by torch.where, whose nodes carry the number of the cond.
    Within tag_checkpoints. Replaces the code of torch.cond. If it moves: test_branches fails.
    """
    count = 0

    def both(original: Callable, pred: Any, true_fn: Callable, false_fn: Callable, operands: Any = ()) -> Any:
        nonlocal count
        if not isinstance(pred, torch.Tensor):
            return (true_fn if pred else false_fn)(*operands)
        if pred.dtype != torch.bool or pred.numel() != 1:
            raise TraceError(f"torch.cond at {users_line()} takes a predicate of one bool, got {pred.dtype} of shape {list(pred.shape)}")
        count += 1
        number, pred = count, pred.reshape(()) if pred.dim() else pred
        outer = fx_traceback.current_meta.get("custom", {}).get(_BRANCH, ())
        found = []
        for side, function in ((True, true_fn), (False, false_fn)):
            with fx_traceback.annotate({_BRANCH: (*outer, (number, side))}):
                found.append(pytree.tree_flatten(function(*operands)))
        (first, spec), (second, other) = found
        if spec != other:
            raise TraceError(f"the branches of torch.cond at {users_line()} return different structures: {spec} and {other}")
        with fx_traceback.annotate({_RESULT: number}):
            return pytree.tree_unflatten([_joined(pred, *pair) for pair in zip(first, second, strict=True)], spec)

    with replaced(torch.cond, both):
        yield


def _joined(pred: torch.Tensor, first: Any, second: Any) -> Any:
    """One result of a cond, from both branches."""
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        if type(first) is not type(second) or first != second:
            raise TraceError(f"the branches of torch.cond at {users_line()} return {first} and {second}; return tensors where they differ")
        return first
    if first.shape != second.shape or first.dtype != second.dtype:
        texts = (f"{x.dtype} of shape {list(x.shape)}" for x in (first, second))
        raise TraceError(f"the branches of torch.cond at {users_line()} return {' and '.join(texts)}; both must return the same")
    return torch.where(pred, first, second)


@contextlib.contextmanager
def replaced(function: Any, new: Callable) -> Iterator[None]:
    """While the block runs, a call of `function`, by whatever name it was imported, runs `new(original, *args, **kwargs)`."""
    code, defaults, keywords = function.__code__, function.__defaults__, function.__kwdefaults__
    stack = function.__globals__.setdefault("_autoshard_replacements", {}).setdefault(function.__name__, [])
    if stack:  # there already where one such block stands in another
        original = stack[0][1]
    else:
        original = types.FunctionType(code, function.__globals__, function.__name__, defaults)
        original.__kwdefaults__ = keywords

    def call(*args: Any, **kwargs: Any) -> Any:
        new, original = _autoshard_replacements["NAME"][0]  # type: ignore[name-defined]  # noqa: F821
        return new(original, *args, **kwargs)

    stack.insert(0, (new, original))
    function.__defaults__ = function.__kwdefaults__ = None
    named = (function.__name__ if const == "NAME" else const for const in call.__code__.co_consts)
    function.__code__ = call.__code__.replace(co_consts=tuple(named))
    try:
        yield
    finally:
        function.__code__, function.__defaults__, function.__kwdefaults__ = code, defaults, keywords
        del stack[0]


def call_flex_attention(original: Any, operator: Callable, *args: Any, **kwargs: Any) -> Any:
    """flex_attention with its checks and results, where `operator` stands for the one it calls; on CPUs with gradients too.

    Runs `original`, its code, with other globals. If they move: test_flex_attention fails.
    """
    others: dict[str, Any] = {"flex_attention_hop": operator, "_validate_device": lambda *tensors: None}
    others["_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"] = True  # calls the operator as it is
    others["setup_compilation_env"] = contextlib.nullcontext
    others["_create_empty_block_mask"] = untraced()(original.__globals__["_create_empty_block_mask"])
    function = types.FunctionType(original.__code__, {**original.__globals__, **others}, original.__name__, original.__defaults__)
    function.__kwdefaults__ = original.__kwdefaults__
    return function(*args, **kwargs)


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """While the block runs, nothing that is computed becomes part of a trace. If it moves: test_flex_attention fails."""
    with proxy_tensor.disable_proxy_modes_tracing(), proxy_tensor._temp_remove_pre_dispatch_torch_function_mode(), torch.no_grad():
        yield


def plain_ops(function: Callable, *args: torch.Tensor) -> fx.GraphModule:
    """`function` as the ops that its vmaps come to on such `args`: export would keep the vmaps. Indices may be tensors of one number."""

    def run(*args: torch.Tensor) -> Any:
        with TransformGetItemToIndex():
            return function(*args)

    with untraced():
        plain = proxy_tensor.make_fx(run, tracing_mode="real")(*args)
    plain.graph.eliminate_dead_code()
    for node in plain.graph.nodes:  # numbers, which vmap casts as if they were tensors
        if node.target is torch.ops.aten._to_copy.default and not isinstance(node.args[0], fx.Node):
            node.target, node.kwargs = torch.ops.aten.scalar_tensor.default, {**node.kwargs, "device": args[0].device}
    plain.recompile()
    return plain


def branch_of(node: fx.Node) -> tuple[tuple[int, bool], ...]:
    """The branches of torch.cond that a node was traced in, outermost first."""
    return (node.meta.get("custom") or {}).get(_BRANCH, ())


def result_of(node: fx.Node) -> int | None:
    """Number of the cond that a node traced as torch.where is a result of."""
    return (node.meta.get("custom") or {}).get(_RESULT)


def region_of(node: fx.Node) -> int | None:
    """Number of the checkpointed region that a node was traced in."""
    return (node.meta.get("custom") or {}).get(_REGION)


def spell_out_keywords(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Give `model.forward`, of a copy, parameters for what this call passes through its `**kwargs`.

    torch.export counts such arguments twice when it matches dynamic shapes to them (torch.export._trace._get_range_constraints).
    If that is mended: this can go.
    """
    original = model.forward
    signature = inspect.signature(original)
    collected = [p.name for p in signature.parameters.values() if p.kind == p.VAR_KEYWORD]
    extra = signature.bind(*args, **kwargs).arguments.get(collected[0]) if collected else None
    if not extra:
        return

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    kept = [p for p in signature.parameters.values() if p.name not in collected]
    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra]
    forward.__signature__ = signature.replace(parameters=[*kept, *named])  # type: ignore[attr-defined]
    model.forward = forward


@contextlib.contextmanager
def record_size_guards(found: Callable[[str, str], Any]) -> Iterator[None]:
    """Call `found(condition, where)` for every condition on sizes that export derives while the block runs.

    Its errors say which size is fixed, but not by which line. Private: the ShapeEnv that torch._export.non_strict_utils
    makes, and its list `guards`. If they move: errors about dynamic sizes name no line.
    """
    module: Any = non_strict_utils
    original = getattr(module, "ShapeEnv", None)
    if original is None:
        yield
        return

    class Recorded(list):
        def append(self, guard: Any) -> None:
            frames = ((frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(None))
            own = next((place for place in frames if not any(part in place[0] for part in ("/torch/", _PACKAGE, "/sympy/", "<"))), None)
            if own is not None:
                found(str(guard.expr), f"{own[0]}:{own[1]}: {linecache.getline(*own).strip()}")
            super().append(guard)

    class Recording(original):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.guards: Any = Recorded(self.guards)

    module.ShapeEnv = Recording
    try:
        yield
    finally:
        module.ShapeEnv = original


def is_in_backward() -> bool:
    """Whether autograd is running a backward pass now. Private: torch._C._current_graph_task_id; nothing public tells."""
    return torch._C._current_graph_task_id() != -1


class _Local(torch.autograd.Function):
    """A DTensor's local tensor; the gradient comes back as a DTensor that lies as the parameter does.

    DTensor.to_local derives global shape and layout of every gradient anew, and lets two parameters share one gradient's
    memory, so that accumulating into one changes the other (test_shared_gradients). Here the parameter's own spec serves,
    and a gradient that anybody else holds is copied. Private: DTensor's constructor, `_spec`, `Tensor._use_count`. If they
    move: use `DTensor.to_local` on a clone.
    """

    @staticmethod
    def forward(ctx: Any, parameter: DTensor) -> torch.Tensor:
        ctx.spec = parameter._spec
        return parameter._local_tensor.view_as(parameter._local_tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> DTensor:
        if grad._use_count() > 1 or not grad.is_contiguous():  # type: ignore[attr-defined]
            grad = grad.clone(memory_format=torch.contiguous_format)
        return DTensor(grad, ctx.spec, requires_grad=grad.requires_grad)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The local tensor of a DTensor, differentiably; other tensors as they are."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.to_local() if torch.compiler.is_compiling() else _Local.apply(tensor)


def let_segments_be_read() -> None:
    """Let `full_tensor()` and redistribute read parameters that are split by segments on torch before 2.13.

    There DTensor's planner takes every _StridedShard for a nesting of axes and raises ValueError for one that stands alone;
    from 2.13 on it falls back to the greedy planner by itself, as it does here. If it moves: such parameters can be trained
    and saved shard by shard, but not put together.
    """
    if torch.torch_version.TorchVersion(torch.__version__) >= (2, 13):  # type: ignore[operator]
        return
    from torch.distributed.tensor._redistribute import DTensorRedistributePlanner as Planner

    original = Planner.generate_graph_based_transform_infos
    if getattr(original, "falls_back", False):
        return

    def generate(self: Any, src_spec: Any, dst_spec: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, src_spec, dst_spec, *args, **kwargs)
        except ValueError:
            return self.generate_greedy_transform_infos(src_spec, dst_spec)

    generate.falls_back = True  # type: ignore[attr-defined]
    Planner.generate_graph_based_transform_infos = generate  # type: ignore[method-assign]


# What plan.memory asks autograd while a step is rehearsed. Private: the names in each function. If they move: plan.memory fails.
outside_modes = _disable_current_modes


def ops_seen_by_autograd() -> int:
    """How many ops autograd has numbered in this thread."""
    return torch.autograd._get_sequence_nr()


def running_gradient() -> str:
    """Name of the gradient that backward is computing now, "" when it is not."""
    node = torch._C._current_autograd_node()
    return node.name() if node is not None else ""


def running_gradient_number() -> int | None:
    """The number that autograd gave to the op whose gradient it is computing now."""
    node = torch._C._current_autograd_node()
    return node._sequence_nr() if node is not None else None


def holders(tensor: torch.Tensor) -> tuple[int, int]:
    """How many hold a tensor, and its storage; views hold the storage too."""
    return tensor._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # type: ignore[attr-defined]


def convolution_kernel(x: torch.Tensor, weight: torch.Tensor, settings: list[Any]) -> str:
    """Name of the kernel that torch chooses for a convolution; settings: stride, padding, dilation, transposed, output_padding, groups."""
    return str(torch._C._select_conv_backend(x, weight, None, *settings))
