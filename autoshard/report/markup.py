"""HTML as text: whatever comes from a model goes through `escape`, and tables know what they sort by."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autoshard.text import human_bytes, human_seconds


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


@dataclass(frozen=True)
class Quantity:
    """A number in a table: what it is sorted by, and as it is shown."""

    value: float
    shown: str


Cell = str | Markup | Quantity


def escape(text: str) -> Markup:
    """Text as HTML; Markup as it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(text))


def element(tag: str, *inner: str, **attributes: str) -> Markup:
    """`<tag a="...">inner</tag>`; text is escaped. class_ is `class`, data_x is `data-x`."""
    given = "".join(f' {name.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for name, value in attributes.items())
    return Markup(f"<{tag}{given}>{''.join(map(escape, inner))}</{tag}>")


def joined(parts: Iterable[str], between: str = "") -> Markup:
    """Parts one after the other, text escaped."""
    return Markup(between.join(map(escape, parts)))


def seconds(value: float) -> Quantity:
    """Seconds with a unit; nothing for none."""
    return Quantity(value, human_seconds(value) if value else "")


def nbytes(value: float) -> Quantity:
    """Bytes with a unit; nothing for none."""
    return Quantity(value, human_bytes(value) if value else "")


def count(value: float) -> Quantity:
    """How many."""
    return Quantity(value, f"{value:,.0f}")


def share(part: float, whole: float) -> Quantity:
    """Per cent of `whole`."""
    found = part / whole if whole else 0.0
    return Quantity(found, f"{found:.1%}")


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]], most: int = 300) -> Markup:
    """A table that sorts by a click on, or Enter in, the head of a column; the first `most` rows.

    columns: names; of a column of numbers with `#` before it.
    """
    all_rows = list(rows)
    heads = joined(_head(name) for name in columns)
    body = joined(element("tr", *map(_cell, row)) for row in all_rows[:most])
    more = element("p", f"{len(all_rows) - most:,} more rows are left out.", class_="note") if len(all_rows) > most else ""
    inner = element("table", element("caption", caption), element("thead", element("tr", heads)), element("tbody", body))
    return joined([element("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption), more])


def _head(name: str) -> Markup:
    button = element("button", name.removeprefix("#"), type="button")
    return element("th", button, scope="col", **({"class_": "number"} if name.startswith("#") else {}))


def _cell(cell: Cell) -> Markup:
    if isinstance(cell, Quantity):
        return element("td", cell.shown, class_="number", data_v=repr(float(cell.value)))
    is_sentence = not isinstance(cell, Markup) and len(cell) > 40
    return element("td", cell, **({"class_": "sentence"} if is_sentence else {}))


def code(text: str) -> Markup:
    """A name from the model or the program; long ones may break at dots and underscores."""
    return element("code", Markup(html.escape(text).replace(".", ".<wbr>").replace("_", "_<wbr>")))


def whole(text: str) -> Markup:
    """A shape or a layout, on one line."""
    return element("code", text, class_="whole")


def paragraph(text: str, kind: str = "") -> Markup:
    """A paragraph; kind: its class."""
    return element("p", text, **({"class_": kind} if kind else {}))
