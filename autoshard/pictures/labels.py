"""The look of pictures: colours, and the HTML-like labels of the DOT language, whose text is always escaped here."""

from __future__ import annotations

import html
from collections.abc import Iterable

import graphviz

INK, PALE, LINE = "#1f2933", "#5f6b78", "#8a97a6"
PILLS = {"all_gather": "#1b7a43", "reduce_scatter": "#7436a8", "all_reduce": "#b3261e", "all_to_all": "#0b6e82", "rotate": "#8a5a00"}
DEPTHS = ("#f6f8fb", "#edf1f7", "#e4eaf3", "#dbe3ee")
PARAMETER = "#fff3c4"
_PLACEMENTS = {"S": "#0b4fc4", "P": "#b34700", "R": PALE, "I": PALE}
_MEANINGS = {"S": "split along a dim", "P": "partial: a term of a sum", "R": "whole, used differently", "I": "whole, used alike"}
_LOCAL = "#e3e7ec"
_RANKS = ("#dfeaff", "#ffe9d6", "#dcf3e1", "#f1e1f7", "#f3e9c9", "#d9f1f2")

NODE = {"shape": "box", "style": "rounded,filled", "fillcolor": "white", "color": INK, "margin": "0.06,0.02"}
CARD = {"style": "filled", "margin": "0.02,0.01"}
SMALL = {"color": "#c9d0d8", "fillcolor": "#fbfcfd", "margin": "0.04,0.02"}
LOCAL = {**SMALL, "fillcolor": _LOCAL}
NOTE = {"shape": "note", "style": "filled", "fillcolor": PARAMETER, "color": "#b59f3b", "margin": "0.03,0.01"}
PORT = {"style": "filled", "fillcolor": "#d8dee6", "penwidth": "1.5"}
STUB = {"shape": "box", "style": "rounded,dashed", "color": LINE, "margin": "0.05,0.02"}
SENT = {"color": "#c2410c", "penwidth": "2.2"}
PLAIN = {"shape": "plain", "style": ""}


def text(words: str, color: str = INK, size: int = 11, is_bold: bool = False) -> str:
    """Escaped words in one font; "" for none."""
    inner = html.escape(words)
    inner = f"<B>{inner}</B>" if is_bold else inner
    return f"<FONT COLOR='{color}' POINT-SIZE='{size}'>{inner}</FONT>" if words else ""


def table(rows: Iterable[str], attributes: str = "CELLSPACING='1' CELLPADDING='1'") -> str:
    """A label of rows of cells; "" without rows."""
    inner = _table(rows, attributes)
    return f"<{inner}>" if inner else ""


def _table(rows: Iterable[str], attributes: str) -> str:
    inner = "".join(f"<TR>{row}</TR>" for row in rows if row)
    return f"<TABLE BORDER='0' CELLBORDER='0' {attributes}>{inner}</TABLE>" if inner else ""


def row(cells: Iterable[str]) -> str:
    """Cells side by side, to stand in one."""
    return _table(["".join(cells)], "CELLSPACING='1' CELLPADDING='1'")


def lines(words: Iterable[str]) -> str:
    """Lines of one cell, flush left."""
    return "".join(f"{line}<BR ALIGN='LEFT'/>" for line in words)


def cell(inner: str, attributes: str = "ALIGN='LEFT'") -> str:
    """One cell."""
    return f"<TD {attributes}>{inner or ' '}</TD>"


def placement(kind: str, words: str) -> str:
    """One placement in its colour: split and partial stand out."""
    return text(words, _PLACEMENTS[kind], 9, is_bold=kind in "SP")


def collective_cell(name: str, words: str, is_forward: bool) -> str:
    """A cell in the colour of a collective: filled where it runs in forward, framed where it only runs in backward."""
    color = PILLS[name]
    if is_forward:
        return cell(text(words, "#ffffff", 9), f"ALIGN='LEFT' BGCOLOR='{color}'")
    return cell(text(words, color, 9), f"ALIGN='LEFT' BORDER='1' COLOR='{color}'")


def tooltip(lines: Iterable[str]) -> str:
    """Lines for a tooltip attribute; a space where there is nothing to say, since graphviz would show the label."""
    return graphviz.escape("\n".join(lines).strip() or " ")


def stage(rank: int) -> dict[str, str]:
    """The frame around a pipeline stage, in the colour of its coordinate on `pp`."""
    return {"style": "rounded,filled", "fillcolor": _RANKS[rank % len(_RANKS)], "color": LINE, "margin": "8"}


def legend(kinds: Iterable[str], has_stages: bool = False) -> tuple[str, str]:
    """What colours and letters mean, in two rows; `kinds` are the collectives of the picture."""
    placements = ", ".join(f"{placement(kind, kind)} {text(words, PALE, 9)}" for kind, words in _MEANINGS.items())
    notes = [(f"BGCOLOR='{PARAMETER}'", "parameter")]
    notes += [(f"BGCOLOR='{PILLS[name]}'", name.replace("_", "-")) for name in PILLS if name in set(kinds)]
    notes += [(f"BORDER='1' COLOR='{PALE}'", "framed: in backward only"), (f"BGCOLOR='{_LOCAL}'", "local, sends nothing")]
    notes += [(f"BGCOLOR='{SENT['color']}'", "sent to a later stage")] if has_stages else []
    swatches = "".join(cell("     ", look) + cell(text(words, PALE, 9)) for look, words in notes)
    return placements, _table([swatches], "CELLSPACING='4' CELLPADDING='1'")
