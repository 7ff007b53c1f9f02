"""Products summed over factors."""

from __future__ import annotations

from autoshard.errors import RuleError
from autoshard.ops.row import Call, Rule, Sized, rows


def addmm(call: Call) -> str:
    """beta * bias + alpha * a @ b, bias of shape (n) or (m, n)."""
    return "+n, ~m k, ~k n -> m n" if len(call.inputs[0].shape) == 1 else "+m n, ~m k, ~k n -> m n"


def matmul(call: Call) -> str:
    """torch.matmul: vectors, matrices and broadcast batches of matrices."""
    a, b = (len(t.shape) for t in call.inputs)
    left = "~k" if a == 1 else "~b* m k"
    right = "~k" if b == 1 else "~k n" if b == 2 else "~b* k n"
    out = " ".join([*(["b*"] if max(a, b) > 2 else []), *(["m"] if a > 1 else []), *(["n"] if b > 1 else [])])
    return f"{left if a != 2 or b > 2 else '~m k'}, {right} -> {out}"


def inner(call: Call) -> str:
    """Sum of products over the last dim of both."""
    a, b = call.inputs
    left, right = (
        " ".join([*(f"{name}{k}" for k in range(len(t.shape) - 1)), *(["k"] if t.shape else [])]) for name, t in (("m", a), ("n", b))
    )
    out = " ".join([*(f"m{k}" for k in range(len(a.shape) - 1)), *(f"n{k}" for k in range(len(b.shape) - 1))])
    return f"~{left}, ~{right} -> {out}"


def _along(call: Call) -> tuple[int, int]:
    """Broadcast dims of both operands, and the dim that the op works along."""
    ndim = max(len(t.shape) for t in call.inputs)
    return ndim, call.get("dim", -1) % ndim


def vectors(call: Call) -> str:
    """Sum of products along one dim, broadcast along the others."""
    ndim, dim = _along(call)
    names = [f"d{k}" for k in range(ndim)]
    operands = [" ".join(names[ndim - len(t.shape) :]) for t in call.inputs]
    return f"~{operands[0]}, ~{operands[1]} -> {' '.join(n for k, n in enumerate(names) if k != dim)}"


def cross(call: Call) -> str:
    """Products of vectors of length 3 along one dim."""
    ndim, dim = _along(call)
    names = [f"[d{k}]" if k == dim else f"d{k}" for k in range(ndim)]
    operands = [" ".join(names[ndim - len(t.shape) :]) for t in call.inputs]
    return f"~{operands[0]}, ~{operands[1]} -> {' '.join(names)}"


def batched_sum(call: Call) -> str:
    """beta * self + alpha * (a @ b), self broadcast against the result."""
    return "+p*, ~b m k, ~b k n -> b m n".replace("p*", " ".join(["b", "m", "n"][3 - len(call.inputs[0].shape) :]))


def summed_batches(call: Call) -> str:
    """beta * self + alpha * sum of a[b] @ b[b]."""
    return "+p*, ~b m k, ~b k n -> m n".replace("p*", " ".join(["m", "n"][2 - len(call.inputs[0].shape) :]))


def plus_vector(call: Call) -> str:
    """beta * self + alpha * (a @ v)."""
    return ("+m" if call.inputs[0].shape else "+") + ", ~m k, ~k -> m"


def kronecker(call: Call) -> Sized:
    """Each dim of the result is a product of dims; the operand with fewer dims counts as having ones in front."""
    a, b = (t.shape for t in call.inputs)
    pairs = range(max(len(a), len(b)), 0, -1)
    sizes = {f"{name}{k}": shape[-k] for name, shape in (("a", a), ("b", b)) for k in pairs if k <= len(shape)}
    terms = [[f"{name}{k}" for name in "ab" if f"{name}{k}" in sizes] for k in pairs]
    out = " ".join(f"({' '.join(term)})" if len(term) > 1 else term[0] for term in terms)
    left, right = (" ".join(f"{name}{k}" for k in pairs if f"{name}{k}" in sizes) for name in "ab")
    return f"~{left}, ~{right} -> {out}", sizes


def einsum(call: Call) -> str:
    """The op's own equation. Repeated letters of one operand (a diagonal) and `...` are not read: such calls are whole."""
    left, arrow, right = call.get("equation").replace(" ", "").partition("->")
    operands = left.split(",")
    if "." in left or any(len(set(letters)) < len(letters) for letters in operands):
        raise RuleError(f"einsum {call.get('equation')!r} takes a diagonal or has dims without letters")
    if not arrow:
        right = "".join(sorted(letter for letter in set(left) - {","} if left.count(letter) == 1))
    return f"{', '.join('~' + ' '.join(letters) for letters in operands)} -> {' '.join(right)}"


ROWS: dict[str, Rule] = {
    **rows("einsum", Rule(einsum, bound="matmul")),
    **rows("linear", Rule("~b* i, ~o i, +o -> b* o", bound="matmul")),
    **rows("bilinear", Rule("~b* i, b* j, ~o i j, +o -> b* o", bound="matmul")),
    **rows("addmm", Rule(addmm, bound="matmul")),
    **rows("addmv", Rule(plus_vector, bound="matmul")),
    **rows("baddbmm", Rule(batched_sum, bound="matmul")),
    **rows("addbmm", Rule(summed_batches, bound="matmul")),
    **rows("mm", Rule("~m k, ~k n -> m n", bound="matmul")),
    **rows("bmm", Rule("~b m k, ~b k n -> b m n", bound="matmul")),
    **rows("matmul linalg_matmul", Rule(matmul, bound="matmul")),
    **rows("mv", Rule("~m k, ~k -> m", bound="matmul")),
    **rows("dot vdot inner", Rule(inner)),
    **rows("outer ger", Rule("~m, ~n -> m n")),
    **rows("addr", Rule("+m n, ~m, ~n -> m n")),
    **rows("linalg_vecdot", Rule(vectors)),
    **rows("kron", Rule(kronecker)),
    **rows("cdist", Rule("b* m [k], b* n [k] -> b* m n", bound="matmul")),
    **rows("linalg_cross", Rule(cross)),
}
