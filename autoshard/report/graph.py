"""The pictures of a plan inside a report, to zoom and search; the DOT text where there is no Graphviz."""

from __future__ import annotations

import re
from typing import get_args

from autoshard.errors import InputError
from autoshard.pictures import Level, Picture, draw
from autoshard.pictures.picture import HOW_TO_GET_DOT
from autoshard.report.markup import Markup, element, joined, paragraph
from autoshard.report.subject import Subject

_LEVELS: tuple[Level, ...] = tuple(level for level in get_args(Level) if level != "ops")
_NAMES = {"modules": "modules", "layer": "one of the repeated layers"}


def graph(subject: Subject) -> Markup:
    """Modules, and one repeated layer in full where there is one."""
    figures = []
    for level in _LEVELS:
        try:
            picture = draw(subject.plan.program, level, subject.costs)
        except InputError:  # no numbered module
            continue
        figures.append(_figure(level, picture))
    hint = "Drag or use the arrow keys to move, Ctrl and the wheel or + and - to zoom; Enter in the search goes to the next hit. "
    hint += "plan.graph('ops') draws every op."
    return joined([paragraph(hint, "note"), *figures])


def _figure(level: str, picture: Picture) -> Markup:
    """A picture with its controls, or its text."""
    title = f"The graph: {_NAMES[level]}"
    try:
        svg = inline_svg(picture.pipe("svg").decode(), level)
    except InputError:
        text = element("pre", picture.source, tabindex="0")
        return joined([paragraph(f"{HOW_TO_GET_DOT}.", "note"), element("details", element("summary", f"{title}, as DOT text"), text)])
    buttons = [
        element("button", shown, type="button", data_zoom=zoom, aria_label=label)
        for zoom, shown, label in (
            ("in", "+", "zoom in"),
            ("out", "−", "zoom out"),
            ("fit", "fit", "fit to width"),
            ("full", "1:1", "full size"),
        )
    ]
    search = '<input type="search" placeholder="search: module, op, S(0)@tp" aria-label="search in the graph">'
    bar = element("div", *buttons, Markup(search), element("output", ""), class_="tools")
    stage = element("div", svg, class_="stage", tabindex="0", role="region", aria_label=title)
    return element("figure", element("figcaption", title), bar, stage, class_="picture")


def inline_svg(text: str, prefix: str) -> Markup:
    """The SVG of dot as part of a page: no prologue, ids of its own, and tooltips that every browser shows."""
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'<a xlink:title="([^"]*)">', lambda found: f"<a><title>{found[1]}</title>" if found[1].strip() else "<a>", text)
    return Markup(re.sub(r"<!--.*?-->\n?", "", text, flags=re.S).strip())
