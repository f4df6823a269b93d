"""Worlds as items of VideoChat-Online's format: conversations whose turns have seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vmemory.data.world.questions import Question, View, ask_stream
from vmemory.data.world.state import VERSION, World

# seconds that a tracked card is followed for after the question, at most
_FOLLOWED = 8


def world_item(world: World, video: str, questions: Sequence[Question]) -> dict[str, Any]:
    """Write questions as turns. Keys beside the format's: `kind` and `evidence` of a turn, `world` of the item."""
    turns: list[dict[str, Any]] = []
    for question in questions:
        evidence = None if question.evidence is None else list(question.evidence)
        value = f"<video>\n{question.text}"
        turns.append(
            {"from": "human", "timestamps": question.time, "value": value, "kind": question.kind, "evidence": evidence}
        )
        turns.append({"from": "gpt", "value": question.answer})
    return {"video": video, "conversations": turns, "world": _facts(world)}


def tracking_item(world: World, video: str, rng: np.random.RandomState) -> dict[str, Any] | None:
    """Follow a card from a moment on, a box a second; None where no card stays for three seconds."""
    staying = [i for i, card in enumerate(world.cards) if card.stop - card.start >= 3]
    if not staying:
        return None
    chosen = staying[rng.randint(len(staying))]
    card = world.cards[chosen]
    asked = int(rng.randint(card.start, card.stop - 1))
    boxes = {t: world.box(t, int(np.flatnonzero(world.card[t] == chosen)[0])) for t in range(card.start, card.stop)}
    lines = [f"At {float(t)}s, {box}" for t, box in boxes.items()]
    turns: list[dict[str, Any]] = []
    for t in range(asked, min(card.stop, asked + 1 + _FOLLOWED)):
        value = "<video>\n"
        if t == asked:
            value += f"Track the {card.name}: what was its box at each second, and what is it from now on?"
        told = lines[: asked - card.start + 1] if t == asked else [lines[t - card.start]]
        first = float(card.start if t == asked else t)
        turns.append(
            {"from": "human", "timestamps": float(t), "value": value, "kind": "tracking", "evidence": [first, float(t)]}
        )
        turns.append({"from": "gpt", "value": "\n".join(told)})
    return {"video": video, "conversations": turns, "world": _facts(world)}


def questions_of(item: dict[str, Any]) -> list[Question]:
    """Read the questions of an item that `world_item` made, without the frames' placeholder.

    Raises:
        ValueError: It is another kind of item.
    """
    turns = item["conversations"]
    if "world" not in item or any("kind" not in turn for turn in turns[::2]):
        raise ValueError(f"item: expected one of a world, got keys {', '.join(item)}")
    out = []
    for human, answer in zip(turns[::2], turns[1::2], strict=True):
        span = human["evidence"]
        text = human["value"].removeprefix("<video>\n")
        evidence = None if span is None else (span[0], span[1])
        out.append(Question(human["kind"], text, answer["value"], human["timestamps"], evidence))
    return out


def make_items(
    world: World, video: str, *, count: int = 12, kinds: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Make the items of one world: questions, and a card to follow if there is one.

    The same arguments give the same items.
    """
    rng = np.random.RandomState(np.random.SeedSequence([VERSION, world.seed, world.seconds, count]).generate_state(8))
    tracking = tracking_item(world, video, rng)
    made = [world_item(world, video, ask_stream(world, rng, kinds, count))]
    return made if tracking is None else [*made, tracking]


def _facts(world: World) -> dict[str, Any]:
    return {
        "version": VERSION, "split": world.split, "seed": world.seed, "seconds": world.seconds, "pace": world.pace
    }  # fmt: skip


def world_of(facts: Mapping[str, Any]) -> World:
    """Build the world that an item's `world` tells of.

    Raises:
        ValueError: It was made by another version, whose seeds make other worlds.
    """
    if facts.get("version") != VERSION:
        raise ValueError(f"world: expected version {VERSION}, got {facts.get('version')!r}")
    return World(facts["seed"], facts["seconds"], split=facts["split"], pace=facts["pace"])


def view_of(world: World, time: float) -> View:
    """Take all that a world has shown by a second into view."""
    return View(world, np.arange(int(time) + 1))
