"""`vmemory chat`: a video language model watches a stream, and is asked about it at any moment."""

from __future__ import annotations

import sys
import time as clock
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from vmemory.banks import POLICIES, MemoryConfig, format_bytes
from vmemory.cli.common import check_writable, timecode
from vmemory.cli.errors import user_input
from vmemory.cli.watch import stop_on_interrupt
from vmemory.stream import Frame
from vmemory.stream.live import open_video
from vmemory.stream.session import VideoSession


def chat(
    model: Annotated[str, typer.Option(help="A folder with a model, or its id on a hub.")],
    video: Annotated[
        str, typer.Option(help="A file, a folder of pictures, rtsp://…, or a camera such as /dev/video0.")
    ],
    bank: Annotated[str, typer.Option(help=f"{', '.join(POLICIES)}.")] = "hierarchical",
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
    from vmemory.stream.loading import device_for, load_model

    if save is not None:
        check_writable(save, folder=False)
    console = Console()
    with user_input():
        settings = MemoryConfig(memory_policy=bank, memory_budget=budget)
        source = open_video(video, fps)
        loaded, processor = load_model(model, device_for(device), dtype)
        session = VideoSession(loaded, processor, config=settings, fps=fps, frame_tokens=frame_tokens)

        def answer(question: str) -> None:
            console.print(f"[bold]{question}[/]", highlight=False)
            for piece in session.stream_generate(question, max_new_tokens=tokens, do_sample=False):
                print(piece, end="", flush=True)
            print()

        questions = typed() if not ask else Queue()
        watch(session, source, questions, answer, console)
        for question in ask or waited(questions):
            answer(question)
    if save is not None:
        session.save(save)
    console.print(status(session), highlight=False)


def typed() -> Queue[str | None]:
    """Lines from the keyboard as they come; None = the last one."""
    lines: Queue[str | None] = Queue()

    def read() -> None:
        for line in sys.stdin:
            if not line.strip():
                break
            lines.put(line.strip())
        lines.put(None)

    Thread(target=read, daemon=True).start()
    return lines


def watch(
    session: VideoSession,
    frames: Iterable[Frame],
    questions: Queue[str | None],
    answer: Callable[[str], None],
    console: Console,
) -> None:
    """Push frames one by one; a question typed meanwhile is answered before the next one, once something is held."""
    started, shown = clock.perf_counter(), Live(console=console, transient=True, auto_refresh=False)
    with stop_on_interrupt() as stop:
        for count, frame in enumerate(frames, 1):
            session.push([frame])
            rate = count / (clock.perf_counter() - started)
            if console.is_terminal:
                shown.start()
                shown.update(f"{timecode(frame.time)}  {rate:.1f} frames/s  {status(session)}", refresh=True)
            while session.num_tokens:
                try:
                    question = questions.get_nowait()
                except Empty:
                    break
                if question is None:
                    # whoever has nothing more to ask still wants to see the end of a file
                    questions.put(None)
                    break
                shown.stop()
                answer(question)
            if stop.asked:
                break
    shown.stop()


def waited(questions: Queue[str | None]) -> Iterator[str]:
    """Questions until the last one, waiting for each."""
    while (question := questions.get()) is not None:
        yield question


def status(session: VideoSession) -> str:
    """What is held: visual tokens and bytes."""
    return f"{session.num_tokens} tokens, {format_bytes(session.nbytes)}"
