"""Products summed over factors."""

from __future__ import annotations

from autoshard.ops.row import Call, Rule, rows


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


ROWS: dict[str, Rule] = {
    **rows("linear", Rule("~b* i, ~o i, +o -> b* o", bound="matmul")),
    **rows("addmm", Rule(addmm, bound="matmul")),
    **rows("mm", Rule("~m k, ~k n -> m n", bound="matmul")),
    **rows("bmm", Rule("~b m k, ~b k n -> b m n", bound="matmul")),
    **rows("matmul", Rule(matmul, bound="matmul")),
}
