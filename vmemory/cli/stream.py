"""`vmemory stream`: push a video into a bounded memory, and answer questions from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmemory.banks import POLICIES, format_bytes
from vmemory.banks.dual.rules import RULES as DUAL_RULES
from vmemory.banks.policies.hierarchical import HIERARCHICAL_RULES
from vmemory.cli.common import (
    BUDGET,
    DTYPES,
    POLICY,
    answer_all,
    check_writable,
    make_bank,
    make_encoder,
    print_answers,
    print_note,
    question,
    read_image,
    timecode,
)
from vmemory.cli.errors import Interrupted, user_input
from vmemory.cli.report import Report, write_report
from vmemory.cli.terminal import Terminal, error_line
from vmemory.cli.watch import Kept, Watched, live_origin_of, origin_of, watch
from vmemory.search.presets import UNTRAINED
from vmemory.search.video_search import VideoSearch
from vmemory.sources import FrameSource, LiveSource
from vmemory.sources.live import open_video
from vmemory.sources.places import name_of, place_of


def stream(
    video: Annotated[
        str,
        typer.Argument(help="A file, a directory of pictures, a film at http://…, rtsp://…, or a camera."),
    ],
    bank: Annotated[str, typer.Option(help=f"Policy: {', '.join(POLICIES)}.")] = POLICY,
    rule: Annotated[
        str | None,
        typer.Option(help=f"Of hierarchical: {', '.join(HIERARCHICAL_RULES)}; of dual: {', '.join(DUAL_RULES)}."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help=f"Hard bound on the memory's bytes; {BUDGET} if not given.")
    ] = None,
    entries: Annotated[int | None, typer.Option(help="Entries to hold, instead of a budget.")] = None,
    fps: Annotated[float, typer.Option(help="Frames a second to look at.")] = 1.0,
    ask: Annotated[list[str], typer.Option(help="A sentence to look for; may be repeated.")] = [],  # noqa: B006
    image: Annotated[list[Path], typer.Option(help="A picture to look for; may be repeated.")] = [],  # noqa: B006
    k: Annotated[int, typer.Option("-k", help="Answers a question.", min=1, max=100)] = 5,
    out: Annotated[Path | None, typer.Option(help="Directory for report.html and timeline.png.")] = None,
    save: Annotated[Path | None, typer.Option(help="A .vmem file that `vmemory ask` reads.")] = None,
    dtype: Annotated[str, typer.Option(help=f"Of the tokens held: {', '.join(DTYPES)}.")] = "float16",
    keep: Annotated[
        int | None,
        typer.Option(
            help="Tokens a side that an entry keeps, a third of the frame's if not given; not of hierarchical and dual."
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--calibrate", help="Seconds whose mean token is subtracted from all; 0 = none.", min=0)
    ] = 60.0,
) -> None:
    """Watch a video, and answer from what the memory still holds."""
    if out is not None:
        check_writable(out, folder=True)
    if save is not None:
        check_writable(save, folder=False)
    texts = [question(text) for text in ask]
    pictures = [(path.name, read_image(path)) for path in image]
    place = place_of(video)
    if isinstance(place, Path) and not place.is_char_device():
        # inputs that can be read twice are checked before anything large is loaded
        with user_input():
            FrameSource(place, fps)
    encoder = make_encoder()
    if budget is None and entries is None:
        budget = BUDGET
    empty = make_bank(encoder, bank, rule, budget, entries, dtype, keep)
    with user_input():
        source = open_video(video, fps, encoder.frame_size)
    origin, frames, name = None, Kept(source), name_of(place)
    if seconds > 0 and isinstance(source, LiveSource):
        origin = live_origin_of(encoder, frames, seconds, name)
    elif seconds > 0:
        origin = origin_of(encoder, video, fps, seconds, encoder.frame_size)
    facts = {"video": name, "fps": fps, "budget": budget}
    if bank == "dual":
        facts["note"] = UNTRAINED
    memory = VideoSearch(encoder, empty, origin=origin, facts=facts)

    watched = watch(memory, frames, batch=encoder.batch_size, duration=source.duration, name=name)
    memory.facts["duration"] = source.duration
    if memory.latency.frames == 0:
        raise Interrupted("interrupted before the first frame")
    warning = "; ".join(text for text in (source.warning, watched.broken) if text) or None
    if warning:
        error_line(f"warning: {warning}")
    if save is not None:
        memory.save(save)
    terminal = Terminal()
    terminal.line(summary(memory, watched))
    print_note(terminal, memory)
    terminal.line()
    questions = answer_all(memory, texts, pictures, k)
    print_answers(terminal, questions)
    if out is not None:
        page = write_report(out, Report(memory, questions, watched=watched, warning=warning))
        terminal.line(f"report: {page}")
    if watched.interrupted:
        raise Interrupted(f"interrupted after {memory.latency.frames} frames; kept what was seen")


def summary(memory: VideoSearch, watched: Watched) -> str:
    """Return two lines: frames seen and held, and the seconds spent."""
    counts, latency = memory.bank.counts(), memory.latency
    last = float(memory.history.time[-1])
    return (
        f"{counts['seen']} frames to {timecode(last)}, {counts['held']} entries held in "
        f"{format_bytes(memory.bytes_in_use)} of {format_bytes(memory.bank.nbytes)}, {counts['dropped']} dropped\n"
        f"a frame: decoding {1e3 * watched.decode / latency.frames:.1f} ms, "
        f"encoding {1e3 * latency.encode / latency.frames:.1f} ms, "
        f"memory {1e3 * latency.memory / latency.frames:.2f} ms, "
        f"thumbnails {1e3 * latency.thumbnails / latency.frames:.2f} ms"
    )
