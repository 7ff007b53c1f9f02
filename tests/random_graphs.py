"""Random models for property tests, drawn by hypothesis as readable source.

A drawn Graph is the text of a forward method over `self.p0`, `self.p1`, ... and its inputs; what fails is printed as the
model that a person would write. Each line is executed as it is drawn, so that shapes are known, and sizes are products of
2 and 3 so that dims divide on the meshes of the tests, or (`is_odd`) mostly do not.
"""

from __future__ import annotations

import math
import re
import textwrap
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

_SIZES = (2, 4, 6, 12, 3, 8)
_MOST_ELEMENTS = 600
_LARGEST = 20.0
_ODD = {4: 7, 6: 9, 12: 15, 24: 23}


@dataclass(frozen=True)
class Input:
    """A tensor argument: random numbers, or (below `high`) random integers."""

    shape: tuple[int, ...]
    high: int = 0
    needs_grad: bool = False


@dataclass(frozen=True)
class Graph:
    """A model and its inputs. tensors: shape and kind (trainable, frozen, buffer) by name; ties: further names of parameters."""

    lines: tuple[str, ...]
    returns: str
    tensors: dict[str, tuple[tuple[int, ...], str]]
    inputs: dict[str, Input]
    ties: dict[str, str] = field(default_factory=dict)
    is_training: bool = True

    @property
    def source(self) -> str:
        body = textwrap.indent("\n".join([*self.lines, f"return {self.returns}"]), "    ")
        return f"def forward(self, {', '.join(self.inputs)}):\n{body}\n"

    def __repr__(self) -> str:
        head = [f"# {name}: {shape} {kind}" for name, (shape, kind) in self.tensors.items()]
        head += [f"# {name}: {given}" for name, given in self.inputs.items()]
        head += [f"# {name} is {other}" for name, other in self.ties.items()]
        return "\n" + "\n".join([*head, f"# {'training' if self.is_training else 'evaluation'}", self.source])

    def model(self) -> nn.Module:
        """The same values at every call; float64."""
        return _Drawn(self).double().train(self.is_training)

    def arguments(self) -> dict[str, Tensor]:
        return {name: _random_input(name, given) for name, given in self.inputs.items()}


class _Drawn(nn.Module):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        for name, (shape, kind) in graph.tensors.items():
            _register(self, name, shape, kind)
        for name, other in graph.ties.items():
            self.register_parameter(name, getattr(self, other))
        space: dict[str, Any] = dict(_NAMES)
        exec(graph.source, space)
        self._forward = space["forward"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self, *args, **kwargs)


_NAMES = {"torch": torch, "F": F}


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _register(module: nn.Module, name: str, shape: tuple[int, ...], kind: str) -> None:
    value = torch.randn(shape, dtype=torch.float64, generator=_generator(name))
    if kind in ("mean", "variance"):
        module.register_buffer(name, value * 0.1 if kind == "mean" else value.abs() + 0.5)
        return
    scale = 1 / math.sqrt(shape[-1]) if len(shape) > 1 else 1.0
    module.register_parameter(name, nn.Parameter(value * scale, requires_grad=kind == "trainable"))


def _random_input(name: str, given: Input) -> Tensor:
    if given.high:
        return torch.randint(0, given.high, given.shape, generator=_generator(name))
    return torch.randn(given.shape, dtype=torch.float64, generator=_generator(name)).requires_grad_(given.needs_grad)


class Draft:
    """A model while it is drawn: its text so far, and the value of every name."""

    def __init__(self, draw: Callable[[st.SearchStrategy], Any], is_training: bool, is_odd: bool = False) -> None:
        self.draw, self.is_training, self.is_odd = draw, is_training, is_odd
        self.most_ids = 100 if is_odd else 40
        self.lines: list[str] = []
        self.tensors: dict[str, tuple[tuple[int, ...], str]] = {}
        self.inputs: dict[str, Input] = {}
        self.ties: dict[str, str] = {}
        self.values: dict[str, Tensor] = {}
        self.module = nn.Module().train(is_training)

    # ------------------------------------------------------------------------------------------------------- choices

    def choose(self, options: Any) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def size(self, options: Any) -> int:
        """A length: one of `options`, or what stands for it when lengths are to be odd."""
        length = self.choose(options)
        return _ODD.get(length, length) if self.is_odd else length

    def chance(self, percent: int) -> bool:
        return self.draw(st.integers(0, 99)) >= 100 - percent

    def pick(self, accepts: Callable[[Tensor], bool] = lambda x: True, kind: str = "float") -> str | None:
        """A name whose value is accepted, mostly a recent one; None when there is none."""
        names = [n for n, x in self.values.items() if _kind(x) == kind and accepts(x)]
        return names[-1 - min(self.draw(st.integers(0, 5)) // 2, len(names) - 1)] if names else None

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values[name].shape)

    # -------------------------------------------------------------------------------------------------------- making

    def input(self, shape: tuple[int, ...], high: int = 0) -> str:
        name = f"x{len(self.inputs)}"
        self.inputs[name] = Input(shape, high, not high and self.chance(20))
        self.values[name] = _random_input(name, self.inputs[name]).detach()
        return name

    def parameter(self, *shape: int) -> str:
        """`self.pN` of this shape: a new one, a frozen one, or one that is used already, maybe by another name."""
        same = [n for n, (s, kind) in self.tensors.items() if s == shape and kind != "mean" and kind != "variance"]
        if same and self.chance(25):
            name = self.choose(same)
            if self.chance(30):
                tied = f"t{len(self.ties)}"
                self.ties[tied] = name
                self.module.register_parameter(tied, getattr(self.module, name))
                return f"self.{tied}"
            return f"self.{name}"
        return f"self.{self.tensor(shape, 'frozen' if self.chance(12) else 'trainable')}"

    def tensor(self, shape: tuple[int, ...], kind: str) -> str:
        name = f"p{len(self.tensors)}"
        self.tensors[name] = (shape, kind)
        _register(self.module, name, shape, kind)
        return name

    def emit(self, *expressions: str) -> str:
        """Add lines `vN = expression`; returns the last name."""
        last = ""
        for expression in expressions:
            last = f"v{len(self.lines)}"
            self.run(last, expression)
        return last

    def run(self, target: str, expression: str, prefix: str = "") -> None:
        """Add `target = expression`; `target` may be several names."""
        line = f"{target} = {expression}"
        self.lines.append(f"{prefix}{line}")
        space: dict[str, Any] = {**_NAMES, **self.values, "self": self.module}
        with torch.no_grad():
            exec(line, space)
        for name in target.split(", "):
            self.values[name] = space[name]
            x = space[name]
            if _kind(x) == "float" and x.numel() and float(x.abs().max()) > _LARGEST:
                self.lines.append(f"{name} = torch.tanh({name})")
                self.values[name] = torch.tanh(x)

    def graph(self, returns: str) -> Graph:
        return Graph(tuple(self.lines), returns, self.tensors, self.inputs, self.ties, self.is_training)


def _kind(x: Tensor) -> str:
    return "float" if x.is_floating_point() else "bool" if x.dtype == torch.bool else "int"


# --------------------------------------------------------------------------------------------------------------- ops
# Each adds one op, or the few lines of one block, to a draft; False where nothing fits.

OPS: list[Callable[[Draft], bool]] = []


def op(function: Callable[[Draft], Any]) -> Callable[[Draft], Any]:
    OPS.append(function)
    return function


def _dim(d: Draft, x: str) -> int:
    dim = d.draw(st.integers(0, len(d.shape(x)) - 1))
    return dim - len(d.shape(x)) if d.chance(40) else dim


@op
def pointwise(d: Draft) -> Any:
    x = d.pick()
    unary = "torch.relu F.gelu F.silu torch.tanh torch.sigmoid torch.sin F.softplus torch.square torch.neg torch.abs torch.clone torch.erf"
    form = d.choose(
        [
            *(f"{f}({{}})" for f in unary.split()),
            "{} * 0.5",
            "{} + 1.0",
            "1 - {}",
            "{} / 3",
            "{}.clamp(-1.0, 1.5)",
            "-{}",
            "F.dropout({}, 0.0)",
            "{} ** 2",
        ]
    )
    return x and d.emit(form.format(x))


@op
def dropout(d: Draft) -> Any:
    x = d.pick()
    return x and d.emit(f"F.dropout({x}, {0.0 if d.is_training else 0.5}, self.training)")


@op
def binary(d: Draft) -> Any:
    x = d.pick()
    if x is None:
        return False

    def fits(y: Tensor) -> bool:
        try:
            return math.prod(torch.broadcast_shapes(y.shape, d.shape(x))) <= _MOST_ELEMENTS
        except RuntimeError:
            return False

    y = d.pick(fits) or x
    form = d.choose(
        ["{} + {}", "{} - {}", "{} * {}", "{} / ({} ** 2 + 1)", "torch.maximum({}, {})", "torch.add({}, {}, alpha=0.5)", "0.5 * ({} + {})"]
    )
    return d.emit(form.format(x, y))


@op
def with_parameter(d: Draft) -> Any:
    x = d.pick(lambda x: x.dim() > 0)
    if x is None:
        return False
    shape = d.shape(x)
    kept = [size if d.chance(70) else 1 for size in shape[d.draw(st.integers(0, len(shape) - 1)) :]]
    return d.emit(f"{x} {d.choose('*+-')} {d.parameter(*kept)}")


@op
def linear(d: Draft) -> Any:
    x = d.pick(lambda x: x.dim() > 0 and x.shape[-1] > 1)
    if x is None:
        return False
    fan_in = d.shape(x)[-1]
    fan_out = d.size([s for s in _SIZES if d.values[x].numel() // fan_in * s <= _MOST_ELEMENTS] or [2])
    bias = f", {d.parameter(fan_out)}" if d.chance(60) else ""
    return d.emit(f"F.linear({x}, {d.parameter(fan_out, fan_in)}{bias})")


@op
def mlp(d: Draft) -> Any:
    x = d.pick(lambda x: x.dim() > 1 and x.shape[-1] > 1)
    if x is None:
        return False
    fan_in, inner = d.shape(x)[-1], d.size((4, 6, 12))
    if d.chance(50):
        h = d.emit(f"F.gelu(F.linear({x}, {d.parameter(inner, fan_in)}, {d.parameter(inner)}))")
    else:
        both = d.emit(f"F.linear({x}, {d.parameter(2 * inner, fan_in)})")
        d.run("a, b", f"{both}.chunk(2, -1)")
        h = d.emit("F.silu(a) * b")
    y = d.emit(f"F.linear({h}, {d.parameter(fan_in, inner)})")
    return d.emit(f"{x} + {y}")


@op
def matrix_product(d: Draft) -> Any:
    x = d.pick(lambda x: x.dim() in (2, 3, 4))
    if x is None:
        return False
    shape = d.shape(x)
    forms = [f"{x} @ {x}.transpose(-1, -2) / {shape[-1]}", f"torch.matmul({x}.transpose(-2, -1), {x}) / {shape[-2]}"]
    n = d.size((2, 4, 6))
    forms.append(f"{x} @ {d.parameter(shape[-1], n)}")
    if len(shape) == 2:
        forms += [f"torch.mm({x}, {d.parameter(shape[-1], n)})", f"torch.addmm({d.parameter(n)}, {x}, {d.parameter(shape[-1], n)})"]
        forms += [
            f"torch.addmm({d.parameter(shape[0], n)}, {x}, {d.parameter(shape[-1], n)}, beta=0.5, alpha=2)",
            f"{d.parameter(n, shape[0])} @ {x}",
        ]
        forms += [f"torch.mv({x}, {d.parameter(shape[1])})", f"{x} @ {d.parameter(shape[1])}"]
    if len(shape) == 3:
        forms += [f"torch.bmm({x}, {x}.transpose(1, 2))", f"torch.bmm({x}, {d.parameter(shape[0], shape[2], n)})"]
        forms += [f"torch.einsum('bij,jk->bik', {x}, {d.parameter(shape[2], n)})"]
    return d.emit(d.choose(forms))


def _heads(d: Draft, width: int) -> int:
    return d.choose([h for h in (2, 4, 6, 3, 1) if width % h == 0])


@op
def attention(d: Draft) -> Any:
    x = d.pick(lambda x: x.dim() == 3 and x.shape[-1] in (4, 6, 8, 12))
    if x is None:
        return False
    b, t, c = d.shape(x)
    heads = _heads(d, c)
    e = c // heads
    groups = d.choose([g for g in (1, 2, 3) if heads % g == 0]) if d.chance(40) else heads
    inner = (heads + 2 * groups) * e
    bias = f", {d.parameter(inner)}" if d.chance(40) else ""
    how = d.choose(["chunk", "split", "unbind", "apart"] if groups == heads else ["split", "apart"])
    if how == "apart":
        for name, n in (("q", heads), ("k", groups), ("v", groups)):
            d.run(name, f"F.linear({x}, {d.parameter(n * e, c)}).view({b}, {t}, {n}, {e}).transpose(1, 2)")
    elif how == "unbind":
        qkv = d.emit(f"F.linear({x}, {d.parameter(inner, c)}{bias}).view({b}, {t}, 3, {heads}, {e}).permute(2, 0, 3, 1, 4)")
        d.run("q, k, v", f"{qkv}.unbind(0)")
    else:
        qkv = d.emit(f"F.linear({x}, {d.parameter(inner, c)}{bias})")
        d.run("q, k, v", f"{qkv}.chunk(3, -1)" if how == "chunk" else f"{qkv}.split([{heads * e}, {groups * e}, {groups * e}], -1)")
        for name, n in (("q", heads), ("k", groups), ("v", groups)):
            d.run(name, f"{name}.view({b}, {t}, {n}, {e}).transpose(1, 2)")
    y = _attend(d, t, heads != groups)
    merged = d.choose(
        [
            f"{y}.transpose(1, 2).reshape({b}, {t}, {c})",
            f"{y}.transpose(1, 2).flatten(2)",
            f"{y}.permute(0, 2, 1, 3).contiguous().view({b}, {t}, -1)",
        ]
    )
    z = d.emit(merged)
    for name in "qkv":  # read by nothing else: a value that only attention reads is what models have
        del d.values[name]
    return d.emit(f"{x} + F.linear({z}, {d.parameter(c, c)})") if d.chance(70) else z


def _attend(d: Draft, t: int, is_grouped: bool) -> str:
    grouped = ", enable_gqa=True" if is_grouped else ""
    forms = [f"F.scaled_dot_product_attention(q, k, v, is_causal=True{grouped})", f"F.scaled_dot_product_attention(q, k, v{grouped})"]
    forms.append(f"F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones({t}, {t}, dtype=torch.bool).tril(){grouped})")
    forms.append(f"F.scaled_dot_product_attention(q, k, v, attn_mask={d.parameter(t, t)}{grouped})")
    if not is_grouped:
        forms.append("torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1) @ v")
        forms.append(f"((q @ k.transpose(-2, -1)).masked_fill(torch.ones({t}, {t}, dtype=torch.bool).triu(1), -1e9)).softmax(-1) @ v")
    return d.emit(d.choose(forms))


@op
def norm(d: Draft) -> Any:
    x = d.pick(lambda x: x.dim() > 1 and x.shape[-1] > 1)
    if x is None:
        return False
    n = d.shape(x)[-1]
    kind = d.choose(["affine", "plain", "rms", "rms_op", "two"])
    if kind == "rms":
        return d.emit(f"{x} * torch.rsqrt({x}.pow(2).mean(-1, keepdim=True) + 1e-2) * {d.parameter(n)}")
    if kind == "rms_op":
        return d.emit(f"F.rms_norm({x}, ({n},), {d.parameter(n)}, 1e-2)")
    dims = list(d.shape(x)[-2:]) if kind == "two" and len(d.shape(x)) > 2 else [n]
    affine = f", {d.parameter(*dims)}, {d.parameter(*dims)}, 1e-2" if kind != "plain" else ", None, None, 1e-2"
    return d.emit(f"F.layer_norm({x}, {dims}{affine})")


@op
def normalised(d: Draft) -> Any:
    x = d.pick(lambda x: x.dim() > 0)
    return x and d.emit(f"{x}.{d.choose(['softmax', 'log_softmax'])}({_dim(d, x)})")


@op
def reduction(d: Draft) -> Any:
    x = d.pick(lambda x: x.dim() > 0)
    if x is None:
        return False
    dims = d.choose([str(_dim(d, x)), "(0, -1)" if len(d.shape(x)) > 1 else "0"])
    keep = d.choose(["", ", keepdim=True"])
    form = d.choose(["mean", "sum", "mean", "sum", "amax", "var", "cumsum"])
    if form == "cumsum":
        return d.emit(f"{x}.cumsum({_dim(d, x)})")
    if form == "var" and 1 in d.shape(x):
        return False
    whole = d.chance(15) and form in ("mean", "sum")
    return d.emit(f"{x}.{form}()" if whole else f"{x}.{form}({dims}{keep})")


@op
def permutation(d: Draft) -> Any:
    x = d.pick(lambda x: x.dim() > 1)
    if x is None:
        return False
    order = d.draw(st.permutations(range(len(d.shape(x)))))
    return d.emit(d.choose([f"{x}.transpose({_dim(d, x)}, {_dim(d, x)})", f"{x}.permute({', '.join(map(str, order))})"]))


@op
def reshaped(d: Draft) -> Any:
    x = d.pick(lambda x: x.dim() > 0)
    if x is None:
        return False
    shape = list(d.shape(x))
    k = d.draw(st.integers(0, len(shape) - 1))
    options = [f"{x}.unsqueeze({k})", f"{x}.flatten()", f"{x}.reshape(-1)"]
    if k + 1 < len(shape):
        merged = [*shape[:k], shape[k] * shape[k + 1], *shape[k + 2 :]]
        options += [f"{x}.reshape({merged})", f"{x}.flatten({k}, {k + 1})"] * 2
        options += [f"{x}.reshape({[*shape[:k], shape[k + 1], shape[k], *shape[k + 2 :]]})"]
    for part in (2, 3, 4):
        if shape[k] % part == 0 and shape[k] > part and len(shape) < 5:
            split = [*shape[:k], part, shape[k] // part, *shape[k + 1 :]]
            options += [
                f"{x}.reshape({split})",
                f"{x}.unflatten({k}, ({part}, -1))",
                f"{x}.reshape({[-1 if j == k else n for j, n in enumerate(split)]})",
            ]
    if 1 in shape:
        options += [f"{x}.squeeze({shape.index(1)})", f"{x}.expand({[d.choose((2, 4, 3)) if n == 1 else -1 for n in shape]})"] * 2
    return d.emit(d.choose(options))


@op
def expanded(d: Draft) -> Any:
    x = d.pick(lambda x: 0 < x.dim() < 4 and x.numel() <= 100)
    if x is None:
        return False
    k, n = d.draw(st.integers(0, len(d.shape(x)))), d.choose((2, 4, 6, 3))
    shape = list(d.shape(x))
    return d.emit(f"{x}.unsqueeze({k}).expand({[*shape[:k], n, *shape[k:]]})")


@op
def joined(d: Draft) -> Any:
    x = d.pick(lambda x: x.dim() > 0)
    if x is None:
        return False
    y = d.pick(lambda y: y.shape == d.shape(x)) or x
    z = d.pick(lambda z: z.shape == d.shape(x))
    names = d.choose([f"[{x}, {y}]", f"[{x}, {y}, {z}]"])
    if d.values[x].numel() * 3 > _MOST_ELEMENTS:
        return False
    return d.emit(f"torch.{d.choose(['cat', 'stack', 'cat'])}({names}, {_dim(d, x)})")


@op
def pieces(d: Draft) -> Any:
    x = d.pick(lambda x: x.dim() > 0 and max(x.shape) > 1)
    if x is None:
        return False
    shape = d.shape(x)
    k = max(range(len(shape)), key=shape.__getitem__) if d.chance(60) else d.draw(st.integers(0, len(shape) - 1))
    n = shape[k]
    options = [f"select({k}, {d.draw(st.integers(0, n - 1))})", f"select({k}, -1)"]
    if n > 1:
        options += [f"narrow({k}, {d.draw(st.integers(0, 1))}, {n - 1})"]
    if n % 2 == 0 and n > 2:
        options += [f"chunk(2, {k})", f"split({n // 2}, {k})", f"narrow({k}, 0, {n // 2})"] * 2
    if n % 3 == 0 and n > 3:
        options += [f"chunk(3, {k})", f"split([{n // 3}, {n - n // 3}], {k})"] * 2
    if n <= 4:
        options.append(f"unbind({k})")
    form = d.choose(options)
    if form.startswith(("select", "narrow")):
        return d.emit(f"{x}.{form}")
    count = len(eval(f"x.{form}", {"x": d.values[x]}))
    names = [f"w{len(d.lines)}_{j}" for j in range(count)]
    d.run(", ".join(names) + ("" if count > 1 else ","), f"{x}.{form}") if count > 1 else None
    return count > 1


@op
def embedding(d: Draft) -> Any:
    ids = d.pick(kind="int")
    if ids is None or d.values[ids].numel() > d.most_ids:
        return False
    rows, width = d.size([r for r in (12, 8, 24) if r > int(d.values[ids].max())] or [24]), d.size((4, 6, 8))
    if int(d.values[ids].max()) >= rows or int(d.values[ids].min()) < 0:
        return False
    table = d.parameter(rows, width)
    padding = ", padding_idx=1" if d.chance(20) else ""
    x = d.emit(f"F.embedding({ids}, {table}{padding})")
    if d.chance(40):
        x = (
            d.emit(f"{x} + F.embedding(torch.arange({d.shape(x)[-2]}), {d.parameter(12, width)})")
            if len(d.shape(x)) == 3 and d.shape(x)[-2] <= 12
            else x
        )
    return d.emit(f"F.linear({x}, {table})") if d.chance(20) else x


@op
def cross_entropy(d: Draft) -> Any:
    ids = d.pick(lambda x: 0 < x.numel() <= d.most_ids and int(x.min()) >= 0, kind="int")
    if ids is None:
        return False
    top, shape = int(d.values[ids].max()), d.shape(ids)
    logits = d.pick(lambda x: tuple(x.shape[:-1]) == shape and x.dim() > 1)
    if logits is None:
        return False
    classes = d.shape(logits)[-1]
    if classes <= top:
        logits = d.emit(f"F.linear({logits}, {d.parameter(d.size([12 if top < 12 else 24]), classes)})")
        classes = d.shape(logits)[-1]
    options = d.choose(["", f", ignore_index={d.choose((0, 1))}", ", label_smoothing=0.1"])
    weight = f", {d.parameter(classes)}.detach() ** 2 + 0.1" if d.chance(15) else ""
    reduction = d.choose(["", "", ", reduction='sum'", ", reduction='none'"])
    if len(shape) == 1:
        arguments = f"{logits}, {ids}"
    elif d.chance(50):
        arguments = f"{logits}.flatten(0, -2), {ids}.flatten()"
    else:
        arguments = f"{logits}.movedim(-1, 1), {ids}"
    return d.emit(f"F.cross_entropy({arguments}{weight}{options}{reduction})")


@op
def masked(d: Draft) -> Any:
    x = d.pick()
    if x is None:
        return False

    def fits(y: Tensor) -> bool:
        try:
            return torch.broadcast_shapes(y.shape, d.shape(x)) == d.shape(x)
        except RuntimeError:
            return False

    mask = d.pick(fits, kind="bool")
    if mask is None:
        shape = d.shape(x)
        other = d.pick(fits, kind="int")
        made = [f"{x} > 0", f"{x}.detach() < 0.3"]
        made += [f"({other} % 2).bool()", f"{other} > 1"] if other else []
        made += (
            [f"torch.arange({shape[-1]}) < {max(shape[-1] // 2, 1)}", f"torch.tensor([True, False] * {shape[-1]})[:{shape[-1]}]"]
            if shape
            else []
        )
        mask = d.emit(d.choose(made))
    y = d.pick(lambda y: y.shape == d.shape(x)) or x
    return d.emit(
        d.choose(
            [
                f"{x}.masked_fill({mask}, 0.5)",
                f"torch.where({mask}, {x}, {y})",
                f"{x} * {mask}",
                f"torch.where({mask}, {x}, 0.0)",
                f"{x}.masked_fill(~{mask}, -2.0)",
            ]
        )
    )


@op
def whole_numbers(d: Draft) -> Any:
    ids, x = d.pick(kind="int"), d.pick(lambda x: x.dim() > 0 and max(x.shape) > 1)
    options = [f"({ids} + 1) % 7", f"{ids}.clamp(max=3)"] if ids else []
    options += [f"{ids}.to(torch.float64) / 8", f"{ids}.reshape(-1)", f"{ids} * 1"] if ids else []
    options += [f"{x}.argmax({_dim(d, x)})"] if x else []
    return bool(options) and d.emit(d.choose(options))


@op
def without_gradient(d: Draft) -> Any:
    x = d.pick()
    if x is None:
        return False
    name = f"v{len(d.lines)}"
    if d.chance(50):
        return d.emit(f"{x}.detach() * {x}")
    d.lines.append("with torch.no_grad():")
    d.run(name, d.choose([f"torch.tanh({x})", f"{x}.sum(-1, keepdim=True) * 0.1" if d.shape(x) else f"{x} * 2"]), prefix="    ")
    if any(line.startswith(f"{name} = torch.tanh({name})") for line in d.lines[-1:]):
        d.lines[-1] = "    " + d.lines[-1]
    return True


@op
def constant(d: Draft) -> Any:
    x = d.pick(lambda x: x.dim() > 0)
    if x is None:
        return False
    n = d.shape(x)[-1]
    forms = [
        f"{x} * torch.arange({n}, dtype=torch.float64) / {n}",
        f"{x} + torch.ones({n}, dtype=torch.float64)",
        f"{x} * torch.tensor(0.5, dtype=torch.float64)",
    ]
    return d.emit(d.choose([*forms, f"{x} - torch.zeros_like({x})", f"{x} + torch.linspace(0, 1, {n}, dtype=torch.float64).unsqueeze(0)"]))


@op
def in_place(d: Draft) -> Any:
    x = d.pick()
    if x is None:
        return False
    name = d.emit(f"{x} * 1.5")
    d.lines.append(f"{name}.{d.choose(['add_(1.0)', 'mul_(0.5)', 'relu_()'])}")
    space: dict[str, Any] = dict(d.values)
    exec(d.lines[-1], space)
    return True


@op
def convolution(d: Draft) -> Any:
    x = d.pick(lambda x: x.dim() == 4 and x.shape[1] > 1)
    if x is None or min(d.shape(x)[-2:]) < 3:
        return False
    c, o = d.shape(x)[1], d.choose((2, 4, 6))
    groups = 2 if c % 2 == 0 and o % 2 == 0 and d.chance(20) else 1
    bias = d.parameter(o) if d.chance(50) else "None"
    stride, padding = d.choose(((1, 1), (1, 0), (2, 1)))
    y = d.emit(f"F.conv2d({x}, {d.parameter(o, c // groups, 3, 3)} / 3, {bias}, {stride}, {padding}, 1, {groups})")
    return y


@op
def batch_norm(d: Draft) -> Any:
    x = d.pick(lambda x: x.dim() in (2, 3, 4) and x.shape[1] > 1 and x.shape[0] > 1)
    if x is None:
        return False
    c = d.shape(x)[1]
    affine = f"{d.parameter(c)}, {d.parameter(c)}" if d.chance(70) else "None, None"
    stats = f"self.{d.tensor((c,), 'mean')}, self.{d.tensor((c,), 'variance')}" if not d.is_training or d.chance(70) else "None, None"
    return d.emit(f"F.batch_norm({x}, {stats}, {affine}, self.training, 0.1, 1e-2)")


@op
def pool(d: Draft) -> Any:
    x = d.pick(lambda x: x.dim() == 4 and min(x.shape[-2:]) >= 2)
    form = d.choose(
        ["F.max_pool2d({}, 2)", "F.avg_pool2d({}, 2)", "F.adaptive_avg_pool2d({}, 1)", "F.adaptive_avg_pool2d({}, 1).flatten(1)"]
    )
    return x and d.emit(form.format(x))


# ------------------------------------------------------------------------------------------------------------ graphs


def _start(d: Draft) -> None:
    """The inputs, and the first values that models of this kind make of them."""
    kind = d.choose(["sequence", "ids", "matrix", "image", "sequence", "ids"])
    b = d.size((4, 2, 6, 12))
    t, c = d.size((4, 6, 3)), d.size((4, 6, 8, 12))
    if kind == "matrix":
        d.input((12 if d.chance(40) else b, c))
        if d.chance(40):
            d.input(d.shape("x0")[:1], 12)
    elif kind == "image":
        d.input((d.size((4, 2, 6)), d.size((2, 4, 3)), 4, d.choose((4, 6))))
    elif kind == "ids":
        d.input((b if b < 12 else 4, t), 12)
        embedding(d)
        if d.chance(50):
            d.input(d.shape("x0"), 12)
    else:
        d.input((b if b < 12 else 2, t, c))
        if d.chance(30):
            d.input(d.shape("x0")[:2], 12)


def _returns(d: Draft) -> str:
    """One value, several, a dict; biased to the last float, mostly reduced to what a training step wants or as it is."""
    last = d.pick() or "x0"
    names = [last]
    for _ in range(d.draw(st.integers(0, 2))):
        other = d.pick(kind=d.choose(["float", "float", "int", "bool"]))
        names += [other] if other else []
    if d.chance(60):  # a loss of all that is not read otherwise
        text = "\n".join(d.lines)
        unread = [n for n, x in d.values.items() if _kind(x) == "float" and x.numel() and len(re.findall(rf"\b{n}\b", text)) <= 1]
        names[0] = " + ".join(f"({n} ** 2).mean()" for n in [*unread[-4:], last])
    if len(names) == 1:
        return names[0] if d.chance(80) else f"{{'out': {names[0]}}}"
    return d.choose(
        [
            f"({', '.join(names)})",
            "{" + ", ".join(f"'{k}': {n}" for k, n in enumerate(names)) + "}",
            f"({names[0]}, {{'rest': [{', '.join(names[1:])}]}})",
        ]
    )


@st.composite
def graphs(draw: st.DrawFn, most_ops: int = 8, ops: tuple[Callable[[Draft], Any], ...] = (), is_odd: bool = False) -> Graph:
    """A model of up to `most_ops` ops or blocks (of `ops` alone, when given)."""
    d = Draft(draw, is_training=draw(st.integers(0, 3)) < 3, is_odd=is_odd)
    _start(d)
    for _ in range(draw(st.integers(1, most_ops))):
        d.choose(ops or OPS)(d)
    if d.chance(10):
        d.tensor((4, 6), "trainable")  # read by nothing
    return d.graph(_returns(d))
