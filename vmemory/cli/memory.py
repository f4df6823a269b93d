"""`vmemory memory FILE`: list, search, forget, export and count personal memories."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from vmemory._files import replacing
from vmemory.banks import format_bytes
from vmemory.cli.common import check_writable, moment, question, timecode
from vmemory.cli.errors import UserError, user_input
from vmemory.cli.terminal import Terminal, plain_table
from vmemory.encoders import SentenceEncoder
from vmemory.graph import MemoryGraph, PersonalMemory

memory = typer.Typer(help="Look into a personal memory graph, and change it.")

Category = Annotated[str | None, typer.Option(help="Only memories of this category.")]
Node = Annotated[str | None, typer.Option(help="Only memories that begin or end at this node.")]
Since = Annotated[float | None, typer.Option(help="Only memories seen at this second or later.")]
User = Annotated[str, typer.Option(help="Whose memories.")]
Until = Annotated[float | None, typer.Option(help="Only memories seen before this second.")]


@memory.callback()
def _open(
    context: typer.Context,
    graph: Annotated[Path, typer.Argument(metavar="FILE", help="A graph file.")],
) -> None:
    """Keep the file's name for the command that follows."""
    context.obj = graph


def _graph(path: Path, user: str = "me", encoder: SentenceEncoder | None = None) -> MemoryGraph:
    if not path.exists():
        raise UserError(f"{path}: no such file")
    with user_input():
        return MemoryGraph(path, encoder=encoder, user=user)


def _nothing(graph: MemoryGraph, what: str) -> UserError:
    others = [user for user in graph.users if user != graph.user]
    if graph.user not in graph.users:
        known = f"; others are remembered: {', '.join(others[:5])}" if others else ""
        return UserError(f"{graph.path}: nothing is remembered of user {graph.user!r}{known}")
    return UserError(f"{graph.path}: {what}")


@memory.command("list")
def show(
    context: typer.Context,
    node: Node = None,
    category: Category = None,
    since: Since = None,
    until: Until = None,
    at: Annotated[float | None, typer.Option(help="Only memories that are true at this second.")] = None,
    user: User = "me",
    last: Annotated[int, typer.Option(help="The newest so many; 0 for all.", min=0)] = 50,
) -> None:
    """List memories, oldest first."""
    with _graph(context.obj, user) as graph:
        with user_input():
            found = graph.memories(node=node, category=category, since=since, until=until, at=at)
        if not found:
            raise _nothing(graph, "no memory passes")
    terminal = Terminal()
    shown = found[-last:] if last else found
    table = plain_table("id", "time", "category", "memory", "video", right=("id", "time"))
    for entry in shown:
        table.add_row(str(entry.id), moment(entry.time), entry.category, _words(entry), _source(entry))
    terminal.print(table)
    if len(shown) < len(found):
        terminal.line(f"{len(found) - len(shown)} older ones; --last 0 lists them all", style="dim")


@memory.command()
def search(
    context: typer.Context,
    query: Annotated[str, typer.Argument(help="A sentence.")],
    k: Annotated[int, typer.Option("-k", help="Memories that are found by themselves.", min=1, max=1024)] = 5,
    category: Category = None,
    since: Since = None,
    until: Until = None,
    at: Annotated[float | None, typer.Option(help="Only memories that are true at this second.")] = None,
    user: User = "me",
    delta: Annotated[float, typer.Option(help="Least similarity.")] = 0.3,
) -> None:
    """Find memories by a sentence, and those that edges lead to from them."""
    text = question(query)
    with _graph(context.obj, user, SentenceEncoder()) as graph:
        if graph.user not in graph.users:
            raise _nothing(graph, "")
        with user_input():
            found = graph.search(text, k, delta=delta, category=category, since=since, until=until, at=at)
        if not found:
            raise _nothing(graph, f"no memory is as similar to the question as {delta}")
    table = plain_table("score", "time", "category", "memory", "video", "through", right=("score", "time", "through"))
    for entry in found:
        one = entry.memory
        through = "" if entry.via is None else str(entry.via)
        table.add_row(f"{entry.score:.2f}", moment(one.time), one.category, _words(one), _source(one), through)
    Terminal().print(table)


@memory.command()
def forget(
    context: typer.Context,
    everything: Annotated[bool, typer.Option("--everything", help="All memories of the user.")] = False,
    node: Node = None,
    category: Category = None,
    video: Annotated[str | None, typer.Option(help="Only memories of this video.")] = None,
    since: Since = None,
    until: Until = None,
    user: User = "me",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Forget memories: no search finds them, and the file keeps none of their bytes."""
    conditions = {"node": node, "category": category, "video": video, "since": since, "until": until}
    if everything == any(value is not None for value in conditions.values()):
        raise UserError("forget: expected --everything, or one of --node, --category, --video, --since, --until")
    terminal = Terminal()
    with _graph(context.obj, user) as graph:
        if graph.user not in graph.users:
            raise _nothing(graph, "")
        if not yes and not _agreed(f"Forget these memories of {user!r} for ever?"):
            raise UserError("nothing was forgotten")
        with user_input():
            count = graph.forget(user=user, **conditions)  # type: ignore[arg-type]  # each by its name
        if not count:
            raise _nothing(graph, "no memory passes")
        terminal.line(f"forgot {count} {'memory' if count == 1 else 'memories'}")
        graph.settle()
        terminal.line("their bytes are overwritten")


@memory.command()
def export(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(help="A .html page to look at, or a .json file of everything.")],
    user: User = "me",
) -> None:
    """Write all memories of the user, with their pictures, into a page or into JSON."""
    if out.suffix not in (".html", ".json"):
        raise UserError(f"{out}: expected a name that ends with .html or .json")
    check_writable(out, folder=False)
    with _graph(context.obj, user) as graph:
        found = graph.memories()
        if not found:
            raise _nothing(graph, "")
        if out.suffix == ".html":
            from vmemory.cli.memory_page import page

            text = page(graph, found)
        else:
            text = json.dumps([_plain(graph, entry) for entry in found], indent=1, allow_nan=False)
    with replacing(out) as partial:
        partial.write_text(text, encoding="utf-8")
    Terminal().line(f"{len(found)} {'memory' if len(found) == 1 else 'memories'}: {out}")


@memory.command()
def stats(context: typer.Context) -> None:
    """Count memories, nodes and bytes, of all users."""
    with _graph(context.obj) as graph:
        counted = graph.stats()
    if not counted.memories:
        raise UserError(f"{graph.path}: nothing is remembered yet")
    table = plain_table("name", "value", header=False)
    table.columns[0].style = "dim"
    held = ", ".join(f"{name} {format_bytes(size)}" for name, size in counted.nbytes.items() if size)
    for name, value in (
        ("memories", str(counted.memories)), ("nodes", str(counted.nodes)), ("edges", str(counted.edges)),
        ("users", _counts(counted.users)), ("categories", _counts(counted.categories)), ("hold", held),
        ("in memory", format_bytes(counted.ram)), ("on disk", format_bytes(counted.disk)),
    ):  # fmt: skip
        table.add_row(name, value)
    Terminal().print(table)


def _agreed(text: str) -> bool:
    try:
        return typer.confirm(text, err=True)
    except typer.Abort:
        raise UserError("forget: expected an answer, or --yes; nothing was forgotten") from None


def _words(entry: PersonalMemory) -> str:
    end = "" if math.isinf(entry.valid_to) else f"  (until {moment(entry.valid_to)})"
    return f"{entry.text}{end}"


def _source(entry: PersonalMemory) -> str:
    if entry.video is None:
        return ""
    return entry.video if entry.seconds is None else f"{entry.video} {timecode(entry.seconds)}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _plain(graph: MemoryGraph, entry: PersonalMemory) -> dict[str, Any]:
    """Return a memory as JSON has it: no infinite numbers, the picture in base 64."""
    values = {
        name: None if isinstance(value, float) and math.isinf(value) else value
        for name, value in asdict(entry).items()
    }  # fmt: skip
    picture = graph.visual(entry.id, "picture")
    return values | {"picture": base64.b64encode(picture).decode()} if isinstance(picture, bytes) else values
