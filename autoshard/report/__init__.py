"""The report: one HTML file that says what a plan is, costs and does, without network, to be opened in any browser.

Sections are a tuple in sections.py: a new one is a function from a Subject to HTML and a row there. Style and script are the files
report.css and report.js beside this one.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from autoshard.constraints import Template
from autoshard.errors import InputError
from autoshard.report.markup import Markup, element, escape, joined, paragraph
from autoshard.report.sections import SECTIONS, parameter_table
from autoshard.report.subject import Subject

if TYPE_CHECKING:
    from autoshard.plan import Plan

__all__ = ["notebook_html", "write"]

_HERE = Path(__file__).parent


def write(
    plan: Plan, path: str | Path, memory: bool = False, alternatives: bool | Sequence[str] = False, other: Plan | None = None
) -> Path:
    """Write the report of `plan` to `path` and return that.

    memory: with the memory of a rank over the step, which takes seconds. alternatives: templates that are solved for and priced beside
    the plan, a search each; True for all. other: a plan to compare with.
    Raises InputError for unknown templates, or where the file cannot be written.
    """
    known = get_args(Template)[1:]
    asked = known if alternatives is True else tuple(alternatives or ())
    if wrong := [name for name in asked if name not in known]:
        raise InputError(f"alternatives are templates: {', '.join(map(repr, known))}; not {', '.join(map(repr, wrong))}")
    text = page(Subject(plan, memory, asked, other))
    path = Path(path)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write the report {path}: {error}") from error
    return path


def page(subject: Subject) -> str:
    """The whole file."""
    plan = subject.plan
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    parts = [(section, section.build(subject)) for section in SECTIONS]
    shown = [(section, inner) for section, inner in parts if inner is not None]
    links = joined(element("a", section.title, href=f"#{section.name}") for section, _ in shown)
    body = joined(
        element("section", element("h2", section.title), inner, id=section.name, aria_label=section.title) for section, inner in shown
    )
    title = f"{plan.model_name} on {plan.program.whole_mesh}"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{style}</style>",
    ]
    top = element(
        "header", element("h1", title), paragraph(f"{plan.program.whole_mesh.size} ranks, hardware {plan.hardware.name}, {_asked(plan)}")
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{chr(10).join(head)}\n</head>\n<body>\n'
        f'<a class="skip" href="#content">To the content</a>\n{top}\n{element("nav", links, aria_label="sections")}\n'
        f'<main id="content">\n{body}\n</main>\n<script>{script}</script>\n</body>\n</html>\n'
    )


def _asked(plan: Plan) -> str:
    how = "solved for the least step time" if plan.template == "auto" else f"template {plan.template}"
    return how + (f", {len(plan.constraints)} constraints" if plan.constraints else "")


def notebook_html(plan: Plan) -> Markup:
    """What a notebook shows of a plan: the summary in words, and parameters with layouts."""
    words = joined(paragraph(text) for text in plan.explain().summary)
    return element("div", words, parameter_table(plan, has_reasons=False))
