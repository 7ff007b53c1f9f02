"""Random ops."""

from __future__ import annotations

from autoshard.ops.row import Call, Rule, rows


def _dropout(call: Call) -> bool:
    return bool(call.get("train") and call.get("p"))


ROWS: dict[str, Rule] = {
    **rows("dropout", Rule("~p* -> p*", is_random=_dropout)),
}
