"""Recurrent layers: samples are split for free, hidden units at the price of gathering the state at every step."""

from __future__ import annotations

from autoshard.ops.row import Call, Lowering, Rule, Sized, rows

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_LONGEST = 256  # steps that a lowering unrolls


def _draws(call: Call) -> bool:
    return bool(call.get("train") and call.get("dropout") and call.get("num_layers", 1) > 1)


def recurrent(call: Call) -> Sized:
    """Layers over time, which stays whole; hidden units too where dropout draws, units are projected or time is long."""
    states = 2 if call.op.startswith("aten.lstm") else 1
    directions = 2 if call.get("bidirectional") else 1
    params = call.inputs[1 + states :]
    is_projected = len(params) != call.get("num_layers") * directions * (4 if call.get("has_biases") else 2)
    h = "[h]" if _draws(call) or is_projected or call.inputs[0].shape[1 if call.get("batch_first") else 0] > _LONGEST else "h"
    if is_projected:
        own = [" ".join(f"[x{k}d{d}]" for d in range(len(p.shape))) for k, p in enumerate(params)]
    else:
        own = [f"([g] {h}) [x{k}]" if len(p.shape) == 2 else f"([g] {h})" for k, p in enumerate(params)]
    place = "b [t] {}" if call.get("batch_first") else "[t] b {}"
    state = [f"[l] b {f'[s{k}]' if is_projected else h}" for k in range(states)]
    out = place.format("[o]" if is_projected else f"([r] {h})")
    sizes = {} if is_projected else {"g": _GATES[call.op.split(".")[1]], "r": directions}
    return f"{place.format('[x]')}, {', '.join(state + own)} -> {', '.join([out, *state])}", sizes


def cell(call: Call) -> Sized:
    """One step; the state is gathered where its units are split."""
    states = 2 if call.op.startswith("aten.lstm") else 1
    gates = 4 if states == 2 else 3
    own = [f"([g] h) [x{k}]" if len(p.shape) == 2 else "([g] h)" for k, p in enumerate(call.inputs[1 + states :])]
    state = ["b h"] * states
    return f"b [x], {', '.join(state + own)} -> {', '.join(state)}", {"g": gates}


_HIDDEN = {"h": "hidden_axes"}
_ORDERED = frozenset("h")
ROWS: dict[str, Rule] = {
    op: row
    for name in _GATES
    for op, row in rows(
        f"{name}.input", Rule(recurrent, Lowering(name, _HIDDEN, ordered=_ORDERED), is_random=_draws, bound="matmul")
    ).items()
} | {
    **rows("lstm_cell", Rule(cell, Lowering("lstm_cell", _HIDDEN, ordered=_ORDERED), bound="matmul")),
    **rows("gru_cell", Rule(cell, Lowering("gru_cell", _HIDDEN, ordered=_ORDERED), bound="matmul")),
}
