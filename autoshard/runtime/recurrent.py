"""Recurrent layers whose hidden units are split: each rank keeps its units of every gate, the state is gathered at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .axes import Axis
from .conversions import all_gather

__all__ = ["gru", "gru_cell", "lstm", "lstm_cell", "rnn_relu", "rnn_tanh"]

Axes = Sequence[Axis]


def _whole(h: Tensor, axes: Axes) -> Tensor:
    """All units, from the piece of each rank; to be used by each for its own gates."""
    for axis in reversed(axes):
        h = all_gather(h, axis, h.dim() - 1)
    return h


def lstm(
    x: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    hidden_axes: Axes,
) -> tuple[Tensor, Tensor, Tensor]:
    """LSTM; the last dims of `hx`, of the results and of every gate of `params` hold this rank's units."""
    out, (h, c) = _layers(_lstm_step, x, hx, params, has_biases, num_layers, bidirectional, batch_first, hidden_axes)
    return out, h, c


def lstm_cell(
    x: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    hidden_axes: Axes,
) -> tuple[Tensor, Tensor]:
    """One step of lstm."""
    return _lstm_step(F.linear(x, w_ih, b_ih), (hx[0], hx[1]), w_hh, b_hh, hidden_axes)  # type: ignore[return-value]


def gru_cell(
    x: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None, *, hidden_axes: Axes
) -> Tensor:
    """One step of gru."""
    return _gru_step(F.linear(x, w_ih, b_ih), (hx,), w_hh, b_hh, hidden_axes)[0]


State = tuple[Tensor, ...]


def _lstm_step(given: Tensor, state: State, w_hh: Tensor, b_hh: Tensor | None, axes: Axes) -> State:
    h, c = state
    i, f, g, o = (given + F.linear(_whole(h, axes), w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_step(given: Tensor, state: State, w_hh: Tensor, b_hh: Tensor | None, axes: Axes) -> State:
    (h,) = state
    r, z, n = given.chunk(3, -1)
    r_h, z_h, n_h = F.linear(_whole(h, axes), w_hh, b_hh).chunk(3, -1)
    n = (n + (r + r_h).sigmoid() * n_h).tanh()
    z = (z + z_h).sigmoid()
    return ((h - n) * z + n,)


def _tanh_step(given: Tensor, state: State, w_hh: Tensor, b_hh: Tensor | None, axes: Axes) -> State:
    return ((given + F.linear(_whole(state[0], axes), w_hh, b_hh)).tanh(),)


def _relu_step(given: Tensor, state: State, w_hh: Tensor, b_hh: Tensor | None, axes: Axes) -> State:
    return ((given + F.linear(_whole(state[0], axes), w_hh, b_hh)).relu(),)


def _layers(
    step: Callable[..., State],
    x: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    axes: Axes,
) -> tuple[Tensor, State]:
    """All layers and directions, one time step after the other; results and last states hold this rank's units."""
    directions, each = 2 if bidirectional else 1, 4 if has_biases else 2
    time = 1 if batch_first else 0
    finals: list[State] = []
    for layer in range(num_layers):
        outs = []
        for direction in range(directions):
            number = layer * directions + direction
            w_ih, w_hh, *biases = params[number * each : (number + 1) * each]
            b_ih, b_hh = biases or (None, None)
            state = tuple(h[number] for h in hx)
            steps = list(range(x.shape[time]))
            states = []
            for k in reversed(steps) if direction else steps:
                state = step(F.linear(x.select(time, k), w_ih, b_ih), state, w_hh, b_hh, axes)
                states.append(state[0])
            outs.append(torch.stack(states[::-1] if direction else states, time))
            finals.append(state)
        x = torch.cat([_whole(out, axes) for out in outs], -1) if layer + 1 < num_layers else torch.cat(outs, -1)
    return x, tuple(torch.stack(list(column)) for column in zip(*finals, strict=True))


def _one_state(name: str, step: Callable[..., State]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A layer like lstm whose cells keep one tensor."""

    def layer(
        x: Tensor,
        hx: Tensor,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
        *,
        hidden_axes: Axes,
    ) -> tuple[Tensor, Tensor]:
        out, (h,) = _layers(step, x, [hx], params, has_biases, num_layers, bidirectional, batch_first, hidden_axes)
        return out, h

    layer.__name__ = layer.__qualname__ = name
    return layer


gru = _one_state("gru", _gru_step)
rnn_tanh = _one_state("rnn_tanh", _tanh_step)
rnn_relu = _one_state("rnn_relu", _relu_step)
