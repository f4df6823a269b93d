"""The language model learns to answer, on features of a frozen tower."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmemory.data.world import COLOURS, KINDS, NUMBERS, PLACES, SHAPES, Question, View, World, ask
from vmemory.train.worldlm.eyes import encoded
from vmemory.train.worldlm.labels import NOTHING, joined, labels_of
from vmemory.train.worldlm.model import CELLS
from vmemory.train.worldlm.optimizer import optimizers
from vmemory.train.worldlm.words import END, PAD, SECONDS, VIDEO, vocabulary, word_ids

IGNORED = -100


class Watched(NamedTuple):
    """A world's frames as the tower sees them: seconds `[n]` and features `[n, 4, C]` in half precision."""

    world: World
    seconds: np.ndarray
    features: Tensor


class Phase(NamedTuple):
    """A part of training: steps, clips a step, and frames of a clip."""

    steps: int
    clips: int
    least: int
    most: int


class Asked(NamedTuple):
    """A clip with questions: places of its frames in a `Watched`, the words for their seconds, and the questions."""

    watched: Watched
    places: np.ndarray
    times: np.ndarray
    questions: list[Question]


@torch.no_grad()
def watch(tower: Any, seeds: Sequence[int], frames: int, split: str = "train") -> list[Watched]:
    """Encode `frames` seconds of each of several worlds, in a row or with gaps."""
    out = []
    for seed in seeds:
        rng = np.random.RandomState([seed, 1])
        world = World(seed, int(rng.randint(max(80, frames + 10), 601)), split=split)
        if rng.rand() < 0.5:
            start = rng.randint(world.seconds - frames + 1)
            seconds = np.arange(start, start + frames)
        else:
            seconds = np.sort(rng.permutation(world.seconds)[:frames])
        parts = [encoded(tower, torch.from_numpy(world.render(seconds[i : i + 128])))[0] for i in range(0, frames, 128)]
        out.append(Watched(world, seconds, torch.cat(parts).half()))
    return out


def draw_clip(
    watched: Watched, rng: np.random.RandomState, least: int, most: int, kinds: Sequence[str], count: int
) -> Asked:
    """Take some frames of a world, in a row or with gaps, give them other seconds, and ask about them."""
    total = len(watched.seconds)
    length = int(rng.randint(min(least, total), min(most, total) + 1))
    if rng.rand() < 0.5:
        start = rng.randint(total - length + 1)
        places = np.arange(start, start + length)
    else:
        places = np.sort(rng.permutation(total)[:length])
    seconds = watched.seconds[places]
    # every second that has a word is met
    shift = int(rng.randint(-seconds[0], SECONDS - seconds[-1]))
    questions = ask(View(watched.world, seconds), rng, kinds or None, count)
    moved = [q._replace(answer=str(int(q.answer) + shift)) if q.kind == "past_when" else q for q in questions]
    return Asked(watched, places, seconds + shift, moved)


def rows_of(clips: Sequence[Asked]) -> tuple[Tensor, Tensor, Tensor]:
    """Write prompts with all their questions behind each other: ids and labels `[B, L]`, and features `[N, C]`."""
    known = vocabulary()
    ids, labels = [], []
    for clip in clips:
        row: list[int] = []
        for time in clip.times.tolist():
            row += [known[str(time)], *[known[VIDEO]] * CELLS]
        learned = [IGNORED] * len(row)
        for question in clip.questions:
            text, answer = word_ids(question.text), [*word_ids(question.answer), known[END]]
            row += text + answer
            learned += [IGNORED] * len(text) + answer
        ids.append(torch.tensor(row))
        labels.append(torch.tensor(learned))
    pad = nn.utils.rnn.pad_sequence
    features = torch.cat([clip.watched.features[clip.places].float().flatten(0, 1) for clip in clips])
    return pad(ids, True, known[PAD]), pad(labels, True, IGNORED), features


def scores(model: Any, ids: Tensor, labels: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores of the words that are learned `[n, V]`, and those words `[n]`."""
    embedded = model.get_input_embeddings()(ids)
    seen = (ids == vocabulary()[VIDEO])[..., None]
    embedded = embedded.masked_scatter(seen, model.model.projector(features))
    hidden = model.model.language_model(inputs_embeds=embedded).last_hidden_state
    where = labels[:, 1:] != IGNORED
    return model.lm_head(hidden[:, :-1][where]), labels[:, 1:][where]


def align(model: Any, watched: Sequence[Watched], steps: int, seed: int = 0) -> float:
    """Train the projector to say in word vectors what a cell shows; return the share that it leaves unexplained."""
    known = vocabulary()
    table = model.get_input_embeddings().weight.detach()
    vectors = {
        "colour": COLOURS, "shape": SHAPES, "number": NUMBERS,
        # numbers have no box that is asked for, so the last row of tiles is nothing
        "tile": [box.replace(" ", "") for box in KINDS["now_box"][1] or ()],
    }  # fmt: skip
    labels = joined([labels_of(one.world, one.seconds) for one in watched])
    target = 0.5 * table[[known[place] for place in PLACES]][labels.place.flatten()]
    rare = torch.full((len(target),), 0.1)
    for name, words in vectors.items():
        label = getattr(labels, name).flatten()
        rows = torch.cat(
            [table[[known[word] for word in words]], torch.zeros(NOTHING[name] + 1 - len(words), table.shape[1])]
        )
        target = target + rows[label]
        if name in ("colour", "number"):
            rare += (1 if name == "colour" else 2) * (label < NOTHING[name])
    features = torch.cat([one.features.float().flatten(0, 1) for one in watched])
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.model.projector.parameters(), lr=3e-3)
    variance = target.var()
    # the weighted draw of a step comes from a part of all cells: it cannot weigh more than 2**24
    order = torch.randperm(len(target), generator=draw)[:100_000]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps) + 1e-5
        chosen = (
            order[torch.multinomial(rare[order], 512, generator=draw)]
            if step % 3
            else order[torch.randint(len(order), (512,), generator=draw)]
        )
        loss = F.mse_loss(model.model.projector(features[chosen]), target[chosen]) / variance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss)


def train_language(
    model: Any, watched: Sequence[Watched], phases: Sequence[Phase], held_out: Sequence[Asked], seed: int = 0
) -> list[dict[str, Any]]:
    """Train projector and language model; the rate falls to nothing in each phase.

    Kinds that are answered worst are asked most: their share follows the errors on `held_out`.

    Returns:
        For each tenth of a phase: steps, mean loss, and the accuracy of each kind.
    """
    rng = np.random.RandomState([seed, 2])
    kinds = list(KINDS)
    missing = np.ones(len(kinds))
    log: list[dict[str, Any]] = []
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    done = 0
    for phase in phases:
        running = optimizers(model)
        rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in running]
        losses: list[float] = []
        for step in range(phase.steps):
            share = min(1.0, (step + 1) / 20) * max(0.02, 1 - step / phase.steps)
            for optimizer, own in zip(running, rates, strict=True):
                for group, rate in zip(optimizer.param_groups, own, strict=True):
                    group["lr"] = rate * share
            clips: list[Asked] = []
            while len(clips) < phase.clips:
                chosen = rng.choice(len(kinds), 8, replace=False, p=missing / missing.sum())
                one = watched[rng.randint(len(watched))]
                clip = draw_clip(one, rng, phase.least, phase.most, [kinds[i] for i in chosen], 8)
                clips += [clip] if clip.questions else []
            found, wanted = scores(model, *rows_of(clips))
            loss = F.cross_entropy(found, wanted)
            for optimizer in running:
                optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            for optimizer in running:
                optimizer.step()
            losses.append(float(loss))
            done += 1
            if (step + 1) % max(1, phase.steps // 10) == 0:
                accuracy = answered(model, held_out)
                missing = np.array([1.1 - accuracy.get(kind, 0.0) for kind in kinds])
                log.append({"steps": done, "loss": sum(losses) / len(losses), "accuracy": accuracy})
                losses = []
    return log


@torch.no_grad()
def answered(model: Any, clips: Sequence[Asked], together: int = 16) -> dict[str, float]:
    """Measure the share of questions a kind whose every word would be written: exact match of greedy answers."""
    right: dict[str, list[bool]] = defaultdict(list)
    for first in range(0, len(clips), together):
        part = clips[first : first + together]
        found, wanted = scores(model, *rows_of(part))
        hits = (found.argmax(-1) == wanted).tolist()
        at = 0
        for clip in part:
            for question in clip.questions:
                length = len(word_ids(question.answer)) + 1
                right[question.kind].append(all(hits[at : at + length]))
                at += length
    return {kind: sum(right[kind]) / len(right[kind]) for kind in KINDS if kind in right}
