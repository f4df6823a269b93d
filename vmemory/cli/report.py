"""Write the report: one HTML file without external parts, and its timeline as a picture beside it."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import vmemory
from vmemory._files import replacing
from vmemory.banks import Memory, format_bytes, parse_bytes
from vmemory.cli.common import Question, concepts_text, span_text, timecode
from vmemory.cli.curve import draw_curve, draw_storage
from vmemory.cli.errors import UserError
from vmemory.cli.scores import Scores, table_of
from vmemory.cli.terminal import clean
from vmemory.cli.timeline import DARK, LIGHT, draw_timeline
from vmemory.cli.watch import Watched
from vmemory.cli.world_answers import WorldAnswers, counted_text, told_row, watched_text
from vmemory.eval.setups import CALIBRATION
from vmemory.eval.trailer import LONGEST_SPAN, TOLERANCE
from vmemory.search.thumbnails import jpeg
from vmemory.search.video_search import VideoSearch

# largest number of pictures per tier, and their widths by tier
_SHOWN, _WIDTHS = 300, (128, 96, 72)


@dataclass
class Report:
    """The parts of a report; every part may be missing.

    Attributes:
        memory: The memory at the end.
        questions: Sentences and pictures with their answers.
        watched: The seconds spent; None for a loaded memory.
        warning: Warning of the source.
        scores: Trailer localisation.
        world: Answers of a trained model about a drawn world.
        attribution: Attribution of the video, if the memory has none.
    """

    memory: VideoSearch | None = None
    questions: Sequence[Question] = ()
    watched: Watched | None = None
    warning: str | None = None
    scores: Scores | None = None
    world: WorldAnswers | None = None
    attribution: str | None = None


def write_report(folder: Path, report: Report) -> Path:
    """Write `report.html` and its pictures into a folder; return the page's path."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pictures: dict[str, bytes] = {}
    context: dict[str, Any] = {
        "version": vmemory.__version__,
        "light": LIGHT,
        "dark": DARK,
        "blank": "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA=",
        "warning": report.warning,
        "world": None if report.world is None else _world_part(report.world),
        "title": "Finding moments again",
        "facts": [],
        "footer": _footer(report),
    }
    if report.memory is not None:
        context |= _memory_parts(report, report.memory, pictures)
    if report.scores is not None:
        context |= _score_parts(report.scores, pictures)
    environment = Environment(
        loader=PackageLoader("vmemory.cli", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        # HTML has no control characters; the result of a macro is already clean
        finalize=lambda value: clean(value) if type(value) is str else value,
    )  # fmt: skip
    defaults = dict.fromkeys(("lead", "timeline", "questions", "tables", "tiers", "latency"))
    page = environment.get_template("report.html.j2").render(defaults | context)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in pictures.items():
        with replacing(folder / name) as partial:
            partial.write_bytes(data)
    path = folder / "report.html"
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def _memory_parts(report: Report, memory: VideoSearch, pictures: dict[str, bytes]) -> dict[str, Any]:
    counts, latency = memory.bank.counts(), memory.latency
    if latency.frames == 0:
        raise UserError("no report: the memory has seen no frame")
    given = memory.facts.get("budget")
    budget = memory.bank.nbytes if given is None else parse_bytes(given)
    video, last = memory.facts.get("title") or memory.facts.get("video", "a video"), float(memory.history.time[-1])
    # a single frame has no duration
    duration = max(float(memory.facts.get("duration") or 0.0), last) or 1.0
    raw = counts["seen"] * _frame_bytes(memory.bank)
    bound = ("holds" if given is None else "budget", budget)
    light, dark = (draw_timeline(memory, report.questions, bound, duration, palette) for palette in (LIGHT, DARK))
    pictures["timeline.png"] = light
    encode, work = 1e3 * latency.encode / latency.frames, 1e3 * latency.memory / latency.frames
    limit = "from the first frame on" if given is None else f"of a budget of {format_bytes(budget)}"
    held = f"held, {limit}; all tokens would take {format_bytes(raw)}"
    facts = [
        (format_bytes(memory.bank.nbytes), held),
        (f"{counts['held']}", f"entries, for {counts['seen']} frames seen; {counts['dropped']} dropped"),
        (timecode(last), f"of video watched, {_rate(memory)}"),
        (f"{work:.2f} ms", f"of memory work a frame, beside {encode:.0f} ms of encoding"),
    ]
    tiers, partly = _sheet(memory)
    return {
        "title": f"What {format_bytes(budget).replace('.0 ', ' ')} remembers of {video}",
        "lead": memory.facts.get("note"),
        "facts": facts,
        "timeline": {"light": _uri(light, "png"), "dark": _uri(dark, "png")},
        "questions": [_question(question) for question in report.questions],
        "tiers": tiers,
        "thumbnails": None if memory.thumbnails is None else format_bytes(memory.thumbnails.nbytes),
        "most_shown": _SHOWN if partly else None,
        "encoder": memory.encoder.name,
        "latency": _latency(memory, report.watched),
    }


def _frame_bytes(bank: Memory) -> int:
    """Return the bytes of a whole frame's tokens in the dtype held, or in 16 bits where fewer are held."""
    return math.prod(bank.grid) * bank.dim * (2 if bank.token_dtype is None else bank.token_dtype.itemsize)


def _rate(memory: VideoSearch) -> str:
    fps = memory.facts.get("fps")
    return "every frame" if fps is None else f"{fps:g} frame{'s' if fps != 1 else ''} a second"


def _question(question: Question) -> dict[str, Any]:
    return {
        "text": question.text,
        "image": None if question.image is None else _uri(jpeg(question.image, 320, 82), "jpeg"),
        "truth": None if question.truth is None else timecode(question.truth),
        "answers": [
            {
                "time": timecode(answer.time),
                "span": span_text(answer),
                "score": f"{answer.score:.2f}",
                "tier": answer.level + 1,
                "concepts": concepts_text(answer),
                "picture": answer.thumbnail and _uri(answer.thumbnail, "jpeg"),
            }
            for answer in question.answers
        ],
    }


def _sheet(memory: VideoSearch) -> tuple[list[dict[str, Any]], bool]:
    """Return thumbnails by tier, and whether some were left out."""
    entries, tiers, partly = memory.entries, [], False
    for place, tier in enumerate(memory.bank.tiers):
        there = torch.nonzero(entries.level == tier.level).flatten().tolist()
        step = -(-len(there) // _SHOWN) or 1
        partly |= step > 1
        shown = [
            {"time": timecode(float(entries.time[i])), "picture": data and _uri(data, "jpeg")}
            for i in there[::step]
            for data in (memory.thumbnail(entries, i),)
        ]
        h, w = tier.grid
        count = f"{len(there)} entr{'y' if len(there) == 1 else 'ies'} of {h}×{w} token{'s' if h * w > 1 else ''}"
        tiers.append(
            {
                "name": tier.name.capitalize(),
                "text": count,
                "colour": place % len(LIGHT.tiers) + 1,
                "width": _WIDTHS[min(place, len(_WIDTHS) - 1)],
                "entries": shown,
            }
        )
    return tiers, partly


def _latency(memory: VideoSearch, watched: Watched | None) -> list[dict[str, Any]]:
    latency = memory.latency
    parts = [] if watched is None else [("decoding", watched.decode, "var(--line)")]
    parts += [
        ("encoding", latency.encode, "var(--tier3)"),
        ("memory", latency.memory, "var(--tier1)"),
        ("thumbnails", latency.thumbnails, "var(--tier2)"),
    ]
    whole = sum(seconds for _, seconds, _ in parts) or 1.0
    return [
        {
            "name": name,
            "ms": f"{1e3 * seconds / latency.frames:.2f}",
            "share": f"{seconds / whole:.5f}",
            "percent": f"{100 * seconds / whole:.2f}",
            "colour": colour,
        }
        for name, seconds, colour in parts
    ]


def _score_parts(scores: Scores, pictures: dict[str, bytes]) -> dict[str, Any]:
    groups, unbounded = list(scores.by_bytes.values()), scores.unbounded
    curve = [draw_curve(groups, unbounded, palette) for palette in (LIGHT, DARK)]
    pictures["localisation.png"] = curve[0]
    storage = None
    if len({score.setup.dtype for score in groups[0]}) > 1:
        points = [draw_storage(groups, unbounded, palette) for palette in (LIGHT, DARK)]
        pictures["storage.png"] = points[0]
        storage = dict(zip(("light", "dark"), (_uri(data, "png") for data in points), strict=True))
    captioned = scores.by_entries | scores.by_bytes
    return {
        "storage": storage,
        "curve": dict(zip(("light", "dark"), (_uri(data, "png") for data in curve), strict=True)),
        "tables": [table_of(caption, [*group, unbounded]) for caption, group in captioned.items()],
        "asked": unbounded.asked,
        "tolerance": f"{TOLERANCE:g}",
        "longest": f"{LONGEST_SPAN:g}",
        "calibration": f"{CALIBRATION:g}",
    }


def _world_part(answers: WorldAnswers) -> dict[str, Any]:
    rows = [told_row(told) for told in answers.told]
    return {"watched": watched_text(answers), "counted": counted_text(answers), "rows": rows}


def _footer(report: Report) -> list[str]:
    threads = torch.get_num_threads()
    lines = [
        f"vmemory {vmemory.__version__}, torch {torch.__version__}, {threads} thread{'s' if threads != 1 else ''}, "
        f"{torch.backends.cpu.get_cpu_capability()}"
    ]
    attribution = report.attribution or (report.memory and report.memory.facts.get("attribution"))
    return [attribution, *lines] if attribution else lines


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
