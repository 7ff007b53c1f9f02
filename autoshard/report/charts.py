"""Charts as inline SVG and HTML, sized by their container; numbers are told in tables beside them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from autoshard.memory import KINDS, Point
from autoshard.pipeline_timeline import PipelineTimeline
from autoshard.report.markup import Markup, element, escape, joined
from autoshard.text import human_bytes, human_seconds
from autoshard.timeline import Event, Phase, Timeline

_WIDTH, _BINS, _MOST_EVENTS = 1000, 500, 400
_LEFT, _ROW = 96, 34


def legend(names: Mapping[str, str]) -> Markup:
    """Names with the CSS classes of their colours."""
    items = (element("li", element("span", "", class_=f"swatch {kind}"), name) for name, kind in names.items())
    return element("ul", *items, class_="legend")


def stacked_bar(parts: Sequence[tuple[str, str, float, str]], label: str) -> Markup:
    """One bar in shares. parts: name, CSS class, amount, amount as text."""
    whole = sum(amount for _, _, amount, _ in parts) or 1.0
    pieces = []
    for name, kind, amount, shown in parts:
        width = 100 * amount / whole
        text = name if width > 9 else ""
        pieces.append(element("span", text, class_=f"piece {kind}", style=f"width:{width:.3f}%", title=f"{name}: {shown}, {width:.1f}%"))
    return element("div", *pieces, class_="bar", role="img", aria_label=label)


def _svg(height: float, label: str, *inner: str) -> Markup:
    return element("svg", element("title", label), *inner, viewBox=f"0 0 {_WIDTH} {height:g}", role="img", class_="chart")


def _text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> Markup:
    return Markup(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>')


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>')


# ------------------------------------------------------------------------------------------------------------- timeline


_KINDS: dict[str, Phase] = {"F": "forward", "once": "forward"}  # of a pipeline's actions; the others are parts of backward


def lanes(timeline: Timeline | PipelineTimeline) -> dict[str, list[Event]]:
    """Events by the row that they are drawn in: a stream, or with pipeline stages a rank of `pp`."""
    if isinstance(timeline, PipelineTimeline):
        found: dict[str, list[Event]] = {f"rank {rank} of pp": [] for rank in range(len(timeline.busy_s))}
        for one in timeline.events:
            row, kind = f"rank {one.rank} of pp", _KINDS.get(one.kind, "backward")
            found[row].append(Event(row, str(one), f"stage {one.stage}", one.start_s, one.end_s, kind))
        return found
    names = {stream: f"sent @{stream}" if k else stream for k, stream in enumerate(timeline.busy_s)}
    return {name: [event for event in timeline.events if event.stream == stream] for stream, name in names.items()}


def timeline_chart(timeline: Timeline | PipelineTimeline) -> Markup:
    """A row per stream. Few events are drawn one by one, many as how busy a stream is in each of 500 intervals, by phase."""
    rows = lanes(timeline)
    total, span = timeline.total_s or 1.0, _WIDTH - _LEFT
    parts: list[str] = []
    for row, (name, events) in enumerate(rows.items()):
        top = row * _ROW + 4
        parts.append(_text(0, top + 17, name))
        parts.append(Markup(f'<rect x="{_LEFT}" y="{top}" width="{span}" height="{_ROW - 8}" class="lane"/>'))
        parts += _single(events, total, top) if len(timeline.events) <= _MOST_EVENTS else _binned(events, total, top)
    bottom = len(rows) * _ROW + 4
    for k in range(5):
        x = _LEFT + span * k / 4
        anchor = "start" if k == 0 else "end" if k == 4 else "middle"
        parts += [_line(x, 0, x, bottom, "grid"), _text(x, bottom + 14, human_seconds(total * k / 4) if k else "0", anchor, "axis")]
    return _svg(bottom + 20, f"Timeline of one step, {human_seconds(total)}", *parts)


def _single(events: Sequence[Event], total: float, top: float) -> list[Markup]:
    scale = (_WIDTH - _LEFT) / total
    found = []
    for event in events:
        width = max((event.end_s - event.start_s) * scale, 0.4)
        tip = escape(f"{event.name} ({event.kind}), {event.module or 'the model'}: {human_seconds(event.end_s - event.start_s)}")
        box = f'x="{_LEFT + event.start_s * scale:.2f}" y="{top}" width="{width:.2f}" height="{_ROW - 8}"'
        found.append(Markup(f'<rect {box} class="phase-{event.kind}"><title>{tip}</title></rect>'))
    return found


def _binned(events: Sequence[Event], total: float, top: float) -> list[Markup]:
    busy = busy_shares(events, total, _BINS)
    width, height = (_WIDTH - _LEFT) / _BINS, _ROW - 8
    base = [0.0] * _BINS
    found = []
    for phase, shares in busy.items():
        steps = []
        for k, part in enumerate(shares):
            if part > 0.004:
                low, high = top + height * (1 - base[k]), top + height * (1 - min(base[k] + part, 1.0))
                x = _LEFT + k * width
                steps.append(f"M{x:.1f} {low:.1f}V{high:.1f}h{width:.2f}V{low:.1f}z")
                base[k] += part
        found.append(Markup(f'<path d="{"".join(steps)}" class="phase-{phase}"><title>{phase}</title></path>'))
    return found


def busy_shares(events: Sequence[Event], total: float, bins: int) -> dict[str, list[float]]:
    """By phase the share of each of `bins` equal intervals of the step in which something runs."""
    found: dict[str, list[float]] = {}
    for event in events:
        shares = found.setdefault(event.kind, [0.0] * bins)
        start, end = event.start_s / total * bins, event.end_s / total * bins
        for k in range(int(start), min(int(end) + 1, bins)):
            shares[k] += max(0.0, min(end, k + 1) - max(start, k))
    return found


# --------------------------------------------------------------------------------------------------------------- memory


def memory_chart(curve: Sequence[Point], limits: Mapping[str, float]) -> Markup:
    """Bytes by kind over the step, stacked; limits: what they are compared with, drawn where they fit the scale.

    Of many points the highest of every interval is drawn.
    """
    points = thinned(curve, _BINS)
    peak = max(point.total_bytes for point in points) or 1
    shown = {name: limit for name, limit in limits.items() if limit <= 3 * peak}
    top, height, span = max([peak, *shown.values()]) * 1.08, 260.0, _WIDTH - _LEFT
    step = span / max(len(points) - 1, 1)

    def y(size: float) -> float:
        return height * (1 - size / top)

    parts: list[str] = [_text(_LEFT - 6, y(top * k / 4) + 4, human_bytes(top * k / 4) if k else "0", "end", "axis") for k in range(4)]
    parts += [_line(_LEFT, y(top * k / 4), _WIDTH, y(top * k / 4), "grid") for k in range(4)]
    below = [0] * len(points)
    for k, kind in enumerate(KINDS):
        if any(point.by_kind[k] for point in points):
            above = [low + point.by_kind[k] for low, point in zip(below, points, strict=True)]
            edge = [f"{_LEFT + step * n:.1f} {y(size):.1f}" for n, size in enumerate(above)]
            back = [f"{_LEFT + step * n:.1f} {y(size):.1f}" for n, size in reversed(list(enumerate(below)))]
            parts.append(Markup(f'<path d="M{"L".join([*edge, *back])}z" class="kind-{k}"><title>{kind}</title></path>'))
            below = above
    has_actions = any(point.action for point in points)
    marks = _action_marks if has_actions else _phase_marks
    parts += marks([point.action or point.phase for point in points], step, height)
    for name, limit in shown.items():
        parts += [_line(_LEFT, y(limit), _WIDTH, y(limit), "limit"), _text(_WIDTH, y(limit) - 4, name, "end", "limit-name")]
    return _svg(height + 22, f"Memory of a rank over one step, at most {human_bytes(peak)}", *parts)


def thinned(curve: Sequence[Point], most: int) -> list[Point]:
    """No more than `most` points: of each interval the highest."""
    if len(curve) <= most:
        return list(curve)
    bounds = [round(k * len(curve) / most) for k in range(most + 1)]
    return [max(curve[low:high], key=lambda point: point.total_bytes) for low, high in itertools.pairwise(bounds)]


def _phase_marks(phases: Sequence[str], step: float, height: float) -> list[Markup]:
    starts = [k for k, phase in enumerate(phases) if k == 0 or phases[k - 1] != phase]
    marks: list[Markup] = []
    free = 0.0
    for k in starts:
        x = _LEFT + step * k
        marks.append(_line(x, 0, x, height, "phase-start"))
        place = max(x, free)  # names of short phases do not lie over each other
        is_last = place > _WIDTH - 60
        marks.append(_text(_WIDTH if is_last else place + 3, height + 16, phases[k], "end" if is_last else "start", "axis"))
        free = place + 70
    return marks


def _action_marks(actions: Sequence[str], step: float, height: float) -> list[Markup]:
    """Where actions of a pipeline begin, with the names of those that have room."""
    marks: list[Markup] = []
    free = 0.0
    for k in (k for k, action in enumerate(actions) if k == 0 or actions[k - 1] != action):
        x, width = _LEFT + step * k, 8.0 * len(actions[k]) + 6
        marks.append(_line(x, 0, x, height, "phase-start"))
        if x >= free and x + width <= _WIDTH:
            marks.append(_text(x + 3, height + 16, actions[k], "start", "axis"))
            free = x + width
    return marks


def memory_legend(curve: Sequence[Point]) -> Markup:
    """The kinds that the chart shows."""
    return legend({kind: f"kind-{k}" for k, kind in enumerate(KINDS) if any(point.by_kind[k] for point in curve)})


def phase_legend(timeline: Timeline | PipelineTimeline) -> Markup:
    """The phases that the timeline shows."""
    return legend({phase: f"phase-{phase}" for phase in dict.fromkeys(e.kind for events in lanes(timeline).values() for e in events)})


def columns(*parts: str) -> Markup:
    """Blocks beside each other where there is room."""
    return element("div", joined(parts), class_="columns")
