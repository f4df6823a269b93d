"""`vmemory demo`: push a ten-minute film into a small memory, ask questions, and compare memories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from vmemory.cli.common import (
    APART,
    POLICY,
    Question,
    answer_all,
    check_writable,
    concepts_text,
    make_bank,
    make_encoder,
    timecode,
)
from vmemory.cli.errors import Interrupted
from vmemory.cli.report import Report, write_report
from vmemory.cli.scores import Scores, measure, print_best
from vmemory.cli.stream import summary
from vmemory.cli.terminal import Terminal
from vmemory.cli.watch import origin_of, watch
from vmemory.cli.world_answers import world_answers, world_lines
from vmemory.data import fetch_film, fetch_trailer, trailer_to_film
from vmemory.data.film import ATTRIBUTION
from vmemory.encoders import FrameEncoder
from vmemory.eval.features import Features, video_features
from vmemory.search.video_search import VideoSearch
from vmemory.sources import Frame, FrameSource

TEXTS = ("a rabbit", "a bird flying in the sky", "a bow and arrow", "end credits, text on a screen")
# second of the trailer whose picture is searched
STILL = 12.0


class Recorder:
    """An encoder that stores its tokens."""

    def __init__(self, encoder: FrameEncoder) -> None:
        self.name = encoder.name
        self.joint, self.text, self.concepts = encoder.joint, encoder.text, encoder.concepts
        self._encoder = encoder
        self.tokens: list[Tensor] = []

    def encode(self, frames: Sequence[np.ndarray]) -> Tensor:
        tokens = self._encoder.encode(frames)
        self.tokens.append(tokens.half())
        return tokens


def demo(
    out: Annotated[Path, typer.Option(help="Directory for report.html, timeline.png and film.vmem.")] = Path("out"),
    budget: Annotated[str, typer.Option(help="Hard bound on the memory's bytes.")] = "4MiB",
) -> None:
    """Watch Big Buck Bunny at one frame a second, ask about it, and measure how memories find moments again.

    The film is decoded once, at two frames per second. Every second frame enters the memory; all are measured. In the
    end a small trained model watches a drawn world of ten minutes through the default memory and answers questions.
    """
    check_writable(out, folder=True)
    encoder = make_encoder()
    bank = make_bank(encoder, POLICY, None, budget, None, "float16")
    film, trailer = fetch_film(), fetch_trailer()
    size, batch = encoder.frame_size, encoder.batch_size
    origin = origin_of(encoder, film, 1.0, 60.0, size)
    facts = {"video": film.name, "title": "Big Buck Bunny", "fps": 1.0, "budget": budget, "attribution": ATTRIBUTION}
    recorder, between = Recorder(encoder), Recorder(encoder)
    memory = VideoSearch(recorder, bank, origin=origin, facts=facts)
    times: list[float] = []

    def push(frames: list[Frame]) -> None:
        memory.push(frames[::2])
        between.encode([frame.image for frame in frames[1::2]])
        times.extend(frame.time for frame in frames)

    source = FrameSource(film, 2.0, size=size)
    watched = watch(memory, source, batch=2 * batch, duration=source.duration, name="Big Buck Bunny", push=push)
    if memory.latency.frames == 0:
        raise Interrupted("interrupted before the first frame")
    memory.facts["duration"] = source.duration
    memory.encoder = encoder
    out.mkdir(parents=True, exist_ok=True)
    memory.save(out / "film.vmem")
    terminal = Terminal()
    terminal.line(summary(memory, watched).partition("\n")[0])
    terminal.line()

    still = next(iter(FrameSource(trailer, start=STILL, size=size))).image
    questions = answer_all(memory, TEXTS, [], 5)
    picture = f"the trailer at {timecode(STILL)}"
    questions.append(Question(picture, still, memory.find(still, 5, apart=APART), trailer_to_film(STILL)))
    for asked in questions:
        terminal.line(_answer(asked))
    terminal.line()
    report = Report(memory, questions, watched=watched, warning=source.warning)
    if not watched.interrupted:
        with Terminal(stderr=True).status("looking up frames of the trailer in every kind of memory"):
            report.scores = _scores(recorder, between, times, trailer, encoder)
        print_best(terminal, report.scores)
        terminal.line()
        with Terminal(stderr=True).status("a trained model watches a world of ten minutes"):
            report.world = world_answers()
        for line in world_lines(report.world):
            terminal.line(line)
        terminal.line()
    terminal.line(f"report: {write_report(out, report)}")
    if watched.interrupted:
        raise Interrupted(f"interrupted after {memory.latency.frames} frames; kept what was seen")


def _answer(asked: Question) -> str:
    """Return a line with the question, the best moment, the encoder's word for it, and the next two moments."""
    words = f"picture of {asked.text}" if asked.image is not None else repr(asked.text)
    truth = "" if asked.truth is None else f" (truly at {timecode(asked.truth)})"
    if not asked.answers:
        return f"{words}{truth}: nothing is held"
    best, *others = asked.answers[:3]
    also = f"; then {', '.join(timecode(answer.time) for answer in others)}" if others else ""
    return f"{words}{truth}: {timecode(best.time)}, {concepts_text(best)}{also}"


def _scores(recorder: Recorder, between: Recorder, times: list[float], trailer: Path, encoder: FrameEncoder) -> Scores:
    even, odd = torch.cat(recorder.tokens), torch.cat(between.tokens)
    recorder.tokens, between.tokens = [], []
    tokens = even.new_empty((len(times), *even.shape[1:]))
    tokens[::2], tokens[1::2] = even, odd
    film = Features(tokens, torch.tensor(times, dtype=torch.float64), None)
    return measure(film, video_features(trailer, encoder, 2.0))
