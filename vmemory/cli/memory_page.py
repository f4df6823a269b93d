"""A page of a user's memories: timeline, graph, people and things with pictures, and what was reduced."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from math import isinf
from typing import Any

import numpy as np

import vmemory
from vmemory.banks import format_bytes
from vmemory.cli.common import moment, timecode
from vmemory.cli.terminal import clean
from vmemory.cli.timeline import DARK, LIGHT
from vmemory.graph import MemoryGraph, PersonalMemory

# one a group of categories, in their order; cycled if there are more
_COLOURS = (
    ("#b3432b", "#e8785a"), ("#c98a1b", "#e9b44c"), ("#3f7d4e", "#7fc08d"), ("#7b7a1f", "#c2c05a"),
    ("#2f6b70", "#66b3b0"), ("#3f62a8", "#86a6e8"), ("#6a5a8c", "#a897d0"), ("#a8437a", "#e388b6"),
    ("#6b6459", "#b0a99d"),
)  # fmt: skip
# most nodes of the drawing and of the gallery, and facts of a card
_DRAWN, _CARDS, _FACTS = 36, 48, 6
_WIDTH, _LEFT, _LANE = 1160, 170, 30
_GRANULARITIES = {
    "nearest": "nearest frame", "mean": "mean of the frames", "vector": "vector of the caption", "caption": "caption",
}  # fmt: skip


def page(graph: MemoryGraph, memories: Sequence[PersonalMemory]) -> str:
    """Return a page without external parts about at least one memory of a user."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    groups = list(dict.fromkeys(category.group for category in graph.categories.values()))
    number = {name: groups.index(category.group) % len(_COLOURS) for name, category in graph.categories.items()}
    times = [entry.time for entry in memories]
    nodes = {label for entry in memories for label in (entry.subject, entry.object) if label}
    lost = sum(bool(entry.reduced) for entry in memories)
    facts = [
        (str(len(memories)), "memories" if len(memories) != 1 else "memory"),
        (str(len(nodes)), "people and things"),
        (timecode(max(times) - min(times)), f"from {moment(min(times))} to {moment(max(times))}"),
        (format_bytes(sum(graph.stats().nbytes.values())), "of captions, vectors and pictures, of all users"),
        (str(lost), "memories with less than they once had"),
    ]
    environment = Environment(
        loader=PackageLoader("vmemory.cli", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: clean(value) if type(value) is str else value,
    )  # fmt: skip
    return environment.get_template("memory.html.j2").render(
        version=vmemory.__version__,
        light=LIGHT,
        dark=DARK,
        colours=_COLOURS,
        title="My memories" if graph.user == "me" else f"Memories of {graph.user}",
        facts=facts,
        timeline=_timeline(graph, memories, groups, number),
        drawing=_drawing(memories, number),
        legend=[
            {"group": group, "colour": groups.index(group) % len(_COLOURS), "count": count, "categories": _join(inside)}
            for group, count, inside in _legend(graph, memories)
        ],
        cards=_cards(graph, memories, number),
        more=max(0, len(nodes) - _CARDS),
        kept=_kept(memories),
        reduced=[
            {"text": entry.text, "time": moment(entry.time), "lost": _join(_GRANULARITIES[g] for g in entry.reduced)}
            for entry in memories
            if entry.reduced
        ][:24],
    )


def _join(names: Any) -> str:
    return ", ".join(names)


def _legend(graph: MemoryGraph, memories: Sequence[PersonalMemory]) -> list[tuple[str, int, list[str]]]:
    """Count memories by group, and name the group's categories with theirs."""
    counts = Counter(entry.category for entry in memories)
    inside: dict[str, list[str]] = {}
    for name, category in graph.categories.items():
        if counts[name]:
            inside.setdefault(category.group, []).append(f"{name} {counts[name]}")
    total: Counter[str] = Counter()
    for name, count in counts.items():
        total[graph.categories[name].group] += count
    return [(group, total[group], names) for group, names in inside.items()]


def _timeline(
    graph: MemoryGraph, memories: Sequence[PersonalMemory], groups: list[str], number: dict[str, int]
) -> dict[str, Any]:
    """Place a mark for each memory: a lane a group, across the time at which it was seen."""
    begin, end = min(entry.time for entry in memories), max(entry.time for entry in memories)
    span = (end - begin) or 1.0
    room = _WIDTH - _LEFT - 24
    used = [group for group in groups if any(graph.categories[entry.category].group == group for entry in memories)]

    def x(seconds: float) -> float:
        return round(_LEFT + room * min(max((seconds - begin) / span, 0.0), 1.0), 1)

    marks = []
    for entry in memories:
        lane = used.index(graph.categories[entry.category].group)
        marks.append(
            {
                "x": x(entry.time), "y": lane * _LANE + _LANE / 2, "colour": number[entry.category],
                "until": None if isinf(entry.valid_to) else x(entry.valid_to), "reduced": bool(entry.reduced),
                "title": f"{moment(entry.time)}  {entry.text}",
            }
        )  # fmt: skip
    ticks = [begin + span * i / 5 for i in range(6)] if end > begin else [begin]
    texts = [moment(tick) for tick in ticks]
    if len({text.split()[0] for text in texts}) == 1:
        # of one day the day is told once
        texts = [texts[0], *(text.split()[-1] for text in texts[1:])]
    elif all(" " in text for text in texts):
        texts = [text.split()[0] for text in texts]
    return {
        "width": _WIDTH,
        "height": len(used) * _LANE,
        "lanes": [{"name": group, "y": i * _LANE + _LANE / 2} for i, group in enumerate(used)],
        "left": _LEFT,
        "marks": marks,
        "ticks": [
            {"x": x(tick), "text": texts[i], "anchor": "end" if i == 5 else "start" if i == 0 else "middle"}
            for i, tick in enumerate(ticks)
        ],
    }


def _drawing(memories: Sequence[PersonalMemory], number: dict[str, int]) -> dict[str, Any] | None:
    """Draw the nodes with the most memories, and the edges between them."""
    facts = [entry for entry in memories if entry.subject]
    degree = Counter(label for entry in facts for label in (entry.subject, entry.object) if label)
    labels = [label for label, _ in degree.most_common(_DRAWN)]
    place = {label: i for i, label in enumerate(labels)}
    drawn: dict[tuple[int, int], list[PersonalMemory]] = {}
    for entry in facts:
        if entry.subject in place and entry.object in place:
            drawn.setdefault((place[entry.subject], place[entry.object]), []).append(entry)
    if not drawn:
        return None
    width, height = _WIDTH, 620
    at = layout(len(labels), list(drawn)) * (width - 260, height - 110) + (130, 55)
    edges = []
    for (begin, end), several in drawn.items():
        # a curve, so that edges there and back lie apart
        middle = (at[begin] + at[end]) / 2 + (at[end] - at[begin])[::-1] * (-0.12, 0.12)
        words = sorted({entry.predicate or "" for entry in several})
        edges.append(
            {
                "path": f"M{at[begin][0]:.1f} {at[begin][1]:.1f} Q{middle[0]:.1f} {middle[1]:.1f} "
                f"{at[end][0]:.1f} {at[end][1]:.1f}",
                "colour": number[several[-1].category], "width": round(1 + np.log2(len(several)), 2),
                "title": f"{labels[begin]} {' / '.join(words[:4])} {labels[end]}",
            }
        )  # fmt: skip
    tint = {
        label: Counter(e.category for e in facts if label in (e.subject, e.object)).most_common(1)[0][0]
        for label in labels
    }
    nodes = [
        {
            "x": round(float(at[i][0]), 1), "y": round(float(at[i][1]), 1), "colour": number[tint[label]],
            "r": round(4 + 3.2 * degree[label] ** 0.5, 1), "title": f"{label}: {degree[label]} memories",
            "label": label if len(label) < 28 else f"{label[:26]}…",
        }
        for i, label in enumerate(labels)
    ]  # fmt: skip
    return {"width": width, "height": height, "edges": edges, "nodes": nodes, "left_out": len(degree) - len(labels)}


def layout(count: int, edges: Sequence[tuple[int, int]]) -> np.ndarray:
    """Place nodes in the unit square: edges pull, nodes push (Fruchterman & Reingold 1991); the same each time."""
    at = np.random.RandomState(0).rand(count, 2)
    ends = np.array(edges)
    near = 0.9 / np.sqrt(max(count, 1))
    for step in range(300):
        apart = at[:, None] - at[None]
        distance = np.maximum(np.linalg.norm(apart, axis=-1, keepdims=True), 1e-3)
        move = (apart / distance * near**2 / distance).sum(1)
        along = at[ends[:, 1]] - at[ends[:, 0]]
        pull = along * np.linalg.norm(along, axis=-1, keepdims=True) / near
        np.add.at(move, ends[:, 0], pull)
        np.add.at(move, ends[:, 1], -pull)
        # towards the middle, so that parts without an edge between them do not drift away
        move += (0.5 - at) * 0.6
        length = np.maximum(np.linalg.norm(move, axis=-1, keepdims=True), 1e-9)
        at += move / length * np.minimum(length, 0.12 * (1 - step / 300))
    low, high = at.min(0), at.max(0)
    return (at - low) / np.where(high > low, high - low, 1)


def _cards(graph: MemoryGraph, memories: Sequence[PersonalMemory], number: dict[str, int]) -> list[dict[str, Any]]:
    """Describe the nodes with the most memories: picture, facts, and what is left of each."""
    about: dict[str, list[PersonalMemory]] = {}
    for entry in memories:
        for label in {entry.subject, entry.object} - {None}:
            about.setdefault(str(label), []).append(entry)
    cards = []
    for label, facts in sorted(about.items(), key=lambda pair: -len(pair[1]))[:_CARDS]:
        own = [entry for entry in facts if entry.object == label] or facts
        picture = next((uri for entry in reversed(own) if (uri := _thumbnail(graph, entry))), None)
        cards.append(
            {
                "label": label, "count": len(facts), "picture": picture, "visits": sum(e.visits for e in facts),
                "more": max(0, len(facts) - _FACTS),
                "facts": [
                    {
                        "time": moment(entry.time), "text": entry.text, "category": entry.category,
                        "colour": number[entry.category], "over": not isinf(entry.valid_to),
                        "left": [
                            {
                                "name": name,
                                "state": "kept" if g in entry.kept else "lost" if g in entry.reduced else "never",
                            }
                            for g, name in _GRANULARITIES.items()
                        ],
                    }
                    for entry in facts[-_FACTS:]
                ],
            }
        )  # fmt: skip
    return cards


def _thumbnail(graph: MemoryGraph, entry: PersonalMemory) -> str | None:
    """Return a memory's picture as a small JPEG in a link, None if it has none or it cannot be decoded."""
    from PIL import Image

    data = graph.visual(entry.id, "picture") if "nearest" in entry.kept else None
    if not isinstance(data, bytes):
        return None
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.draft("RGB", (400, 300))
            small = opened.convert("RGB")
            small.thumbnail((400, 300))
    # decoders may raise any exception on damaged or hostile files; the memory is shown without its picture
    except Exception:
        return None
    made = io.BytesIO()
    small.save(made, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(made.getvalue()).decode()}"


def _kept(memories: Sequence[PersonalMemory]) -> list[dict[str, Any]]:
    """Count, for each granularity, the memories that have it, and those that have lost it."""
    rows = []
    for granularity, name in _GRANULARITIES.items():
        kept = sum(granularity in entry.kept for entry in memories)
        lost = sum(granularity in entry.reduced for entry in memories)
        share = 100 / len(memories)
        rows.append(
            {
                "name": name,
                "kept": kept,
                "lost": lost,
                "kept_share": round(kept * share, 2),
                "lost_share": round(lost * share, 2),
            }
        )
    return rows
