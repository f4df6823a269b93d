"""`vmemory chat`: push a stream into a video language model's memory, and ask questions at any time."""

from __future__ import annotations

import sys
import time as clock
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Annotated

import typer
from rich.live import Live

from vmemory.banks import POLICIES, MemoryConfig, format_bytes
from vmemory.cli.common import check_writable, question, timecode
from vmemory.cli.errors import UserError, user_input
from vmemory.cli.terminal import Terminal, error_line
from vmemory.cli.watch import Kept, stop_on_interrupt
from vmemory.session.session import VideoSession
from vmemory.sources import Frame
from vmemory.sources.live import open_video


def chat(
    model: Annotated[str, typer.Option(help="A folder with a model, or its id on a hub.")],
    video: Annotated[
        str,
        typer.Option(help="A file, a folder of pictures, a film at http://…, rtsp://…, or a camera."),
    ],
    bank: Annotated[str | None, typer.Option(help=f"{', '.join(POLICIES)}.  [default: as attach]")] = None,
    budget: Annotated[str, typer.Option(help="Hard bound on the memory's bytes.")] = "64MiB",
    fps: Annotated[float, typer.Option(help="Frames a second to look at.")] = 1.0,
    ask: Annotated[list[str], typer.Option(help="A question for the end; may be repeated.")] = [],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.", min=1)] = 128,
    frame_tokens: Annotated[int, typer.Option(help="Tokens of a frame at most.", min=1)] = 256,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …  [default: a GPU if there is one]")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    save: Annotated[Path | None, typer.Option(help="A .vmem file to go on from later.")] = None,
) -> None:
    """Let a model watch, and ask it: type a question at any moment, an empty line or Ctrl-D to end."""
    from vmemory.models.loading import device_for, load_model

    if save is not None:
        check_writable(save, folder=False)
    texts = [question(text) for text in ask]
    terminal = Terminal()
    with user_input():
        settings = MemoryConfig(memory_policy=bank, memory_budget=budget)
        source = open_video(video, fps)
        loaded, processor = load_model(model, device_for(device), dtype)
        session = VideoSession(loaded, processor, config=settings, fps=fps, frame_tokens=frame_tokens)

        def answer(text: str) -> None:
            terminal.line(text, style="bold")
            for piece in session.stream_generate(text, max_new_tokens=tokens, do_sample=False):
                terminal.piece(piece)
            terminal.line()

        questions = typed() if not texts else Queue()
        broken = watch(session, source, questions, answer, terminal)
        for warning in (source.warning, broken):
            if warning:
                error_line(f"warning: {warning}")
        for text in texts or waited(questions):
            answer(text)
    if save is not None:
        session.save(save)
    terminal.line(status(session))


def typed() -> Queue[str | None]:
    """Return a queue of lines from the keyboard; None = the end."""
    lines: Queue[str | None] = Queue()

    def read() -> None:
        for line in sys.stdin:
            if not line.strip():
                break
            try:
                lines.put(question(line.strip()))
            except UserError as error:
                error_line(error)
        lines.put(None)

    Thread(target=read, daemon=True).start()
    return lines


def watch(
    session: VideoSession,
    frames: Iterable[Frame],
    questions: Queue[str | None],
    answer: Callable[[str], None],
    terminal: Terminal,
) -> str | None:
    """Push frames one by one, and answer a typed question before the next frame.

    Returns:
        Why the source broke after its first frame, or None.
    """
    started, shown = clock.perf_counter(), Live(console=terminal, transient=True, auto_refresh=False)
    kept = Kept(frames)
    with stop_on_interrupt() as stop:
        for count, frame in enumerate(kept, 1):
            session.push([frame])
            rate = count / (clock.perf_counter() - started)
            if terminal.is_terminal:
                shown.start()
                shown.update(f"{timecode(frame.time)}  {rate:.1f} frames/s  {status(session)}", refresh=True)
            while session.num_tokens:
                try:
                    text = questions.get_nowait()
                except Empty:
                    break
                if text is None:
                    # without further questions a file is still read to its end
                    questions.put(None)
                    break
                shown.stop()
                answer(text)
            if stop.asked:
                break
    shown.stop()
    return kept.broken


def waited(questions: Queue[str | None]) -> Iterator[str]:
    """Wait for questions and yield them until the last one."""
    while (text := questions.get()) is not None:
        yield text


def status(session: VideoSession) -> str:
    """Return the visual tokens and bytes of a session as text."""
    return f"{session.num_tokens} tokens, {format_bytes(session.nbytes)}"
