"""flex_attention in ordinary ops, while a model is traced: its scores and masks are values, which are split as any.

    scores   q @ k^T * scale, in float32 or wider        [B, H, Q, K]
    scores   score_mod(scores, b, h, q, k)               where there is one
    scores   -inf where not mask_mod(b, h, q, k)         where there is a mask
    output   softmax(scores) @ v, zero in rows that are masked everywhere

Source: math_attention of torch/_higher_order_ops/flex_attention.py, what flex_attention computes outside of torch.compile.
The functions are mapped over the indices of batch, head, query and key, which are constants of the program: ranks that
hold some heads hold those heads' indices. Where a mask alone is given, torch's scaled_dot_product_attention computes the
same without holding the scores; a mask that is causal becomes its flag.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from autoshard.errors import TraceError
from autoshard.text import human_bytes
from autoshard.torch_internals import call_flex_attention, plain_ops, replaced, untraced, users_line

_OVER = ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None))


@contextlib.contextmanager
def flex_attention_in_ops(note: Callable[[str], Any] = lambda text: None, *, is_traced: bool = False) -> Iterator[None]:
    """While the block runs, flex_attention is computed in ordinary ops, whoever calls it; `note` gets what the user must know.

    is_traced: for torch.export, which cannot look into functions that are compiled, as flex_attention mostly is.
    """

    @torch.compiler.disable
    def computed(original: Callable, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        wants = given.get("return_lse") or given.get("return_aux") is not None
        attention = _Attention(given.get("score_mod"), given.get("block_mask"), bool(wants))
        result = call_flex_attention(original, attention, *args, **kwargs)
        note(attention.described(users_line(), bool(given.get("kernel_options"))))
        return result

    @torch.compiler.disable
    def made(original: Callable, *args: Any, **kwargs: Any) -> Any:
        with untraced():  # of what it makes, only the function is read
            return original(*args, **kwargs)

    stance = torch.compiler.set_stance("force_eager") if is_traced else contextlib.nullcontext()
    with replaced(flex_attention, computed), replaced(create_block_mask, made), stance:
        yield


class _Attention:
    """Stands for torch's operator in one call of flex_attention."""

    def __init__(self, score_mod: Callable | None, block_mask: Any, wants_statistics: bool) -> None:
        self.score_mod, self.wants_statistics = score_mod, wants_statistics
        self.mask_mod = None if block_mask is None else block_mask.mask_mod
        self.scores: tuple[int, ...] = ()
        self.itemsize = 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, score_mod: Any, mask: Any, scale: float, *_: Any) -> tuple[Any, Any, Any]:
        if key.shape[0] != query.shape[0]:  # one batch of keys for all queries
            key, value = (x.expand(query.shape[0], *x.shape[1:]) for x in (key, value))
        self.scores = (*query.shape[:3], key.shape[2])
        self.itemsize = torch.promote_types(query.dtype, torch.float32).itemsize
        places = [torch.arange(size, device=query.device) for size in self.scores]
        kept = None if self.mask_mod is None else plain_ops(_mapped(self.mask_mod, ()), *places)(*places)
        if self.score_mod is not None and self._keeps_scores(query, places):
            self.score_mod = None
        output = lse = most = None
        if self.score_mod is None:
            shares = query.shape[1] != key.shape[1]
            output = F.scaled_dot_product_attention(query, key, value, kept, scale=scale, enable_gqa=shares)
        if self.score_mod is not None or self.wants_statistics:
            scores = self._scores(query, key, kept, places, scale)
            lse, most = scores.logsumexp(-1) / math.log(2), scores.amax(-1) / math.log(2)  # torch multiplies by log(2)
        if output is None:
            output = torch._safe_softmax(scores, dim=-1).to(query.dtype) @ _shared(value, query.shape[1])
        return output, lse, most

    def _keeps_scores(self, query: Tensor, places: list[Tensor]) -> bool:
        """Whether the function of scores returns them as they are: libraries pass one always."""
        with untraced():
            scores = query.new_empty(self.scores)
        first, *_, last = plain_ops(_mapped(self.score_mod, (0,)), scores, *places).graph.nodes  # type: ignore[arg-type]
        return last.args[0] is first

    def _scores(self, query: Tensor, key: Tensor, kept: Tensor | None, places: list[Tensor], scale: float) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = (query.to(wide) @ _shared(key, query.shape[1]).to(wide).transpose(-2, -1)) * scale
        if self.score_mod is not None:
            scores = plain_ops(_mapped(self.score_mod, (0,)), scores, *places)(scores, *places).to(wide)
        return scores if kept is None else torch.where(kept, scores, -math.inf)

    def described(self, where: str, has_options: bool) -> str:
        """What the user must know of this call."""
        count = math.prod(int(size) for size in self.scores)
        size, mask = human_bytes(count * self.itemsize), human_bytes(count)
        if self.score_mod is not None:
            how = f"computed with dense scores, which take {size} on one device, and their softmax as much again for backward"
        else:
            how = "scaled_dot_product_attention computes it"
            how += f"; its mask takes up to {mask} where it is not causal" if self.mask_mod is not None else ""
            how += f"; what it returns besides, where read, comes from dense scores of {size}" if self.wants_statistics else ""
        options = "; its kernel options are ignored" if has_options else ""
        return f"flex_attention at {where}: {how}{options}"


def refuse_block_masks(leaves: Iterable[Any]) -> None:
    """Raise TraceError for masks among the arguments of a model: a program would keep the first one for ever."""
    if any(isinstance(leaf, BlockMask) for leaf in leaves):
        raise TraceError(
            "a BlockMask is an argument of the model: its function would be baked into the program. "
            "Pass the tensors that it is made from, and call create_block_mask in forward"
        )


def _mapped(function: Callable, before: tuple[int, ...]) -> Callable[..., Tensor]:
    """`function` of the indices of batch, head, query and key, over all of them; of scalars `before` them, over all their dims."""
    for places in _OVER:
        function = torch.vmap(function, in_dims=(*before, *places))
    return function


def _shared(x: Tensor, heads: int) -> Tensor:
    """Keys or values with every head repeated for the query heads that share it."""
    batch, count, length, width = x.shape
    return x if count == heads else x.unsqueeze(2).expand(batch, count, heads // count, length, width).reshape(batch, heads, length, width)
