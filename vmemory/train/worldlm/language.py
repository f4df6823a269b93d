"""The projector learns to say what it sees in words, and the language model to answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmemory.data.world import COLOURS, KINDS, NUMBERS, PLACES, SHAPES
from vmemory.train.worldlm.clips import IGNORED, Asked, Rows, Watched, draw_clip, rows_of, sight
from vmemory.train.worldlm.labels import NOTHING, joined, labels_of
from vmemory.train.worldlm.notes import Notes, targets_of
from vmemory.train.worldlm.optimizer import optimizers
from vmemory.train.worldlm.words import VIDEO, vocabulary, word_ids

# weight of what frames tell, beside answers
NOTES = 0.3

# words that questions use, in cells that show such a thing: what is asked for is found by them
_NOUNS = {"number": "number", "colour": "cards"}


class Phase(NamedTuple):
    """A part of training: steps, clips a step, frames of a clip, questions about it, share of the rate at its end."""

    steps: int
    clips: int
    least: int
    most: int
    questions: int
    until: float = 0.0


def hidden_states(model: Any, rows: Rows, between: bool = False) -> tuple[Tensor, ...]:
    """Return the hidden states `[B, L, C]` behind the last layer, or those between all layers too."""
    embedded = model.get_input_embeddings()(rows.ids)
    cells = (rows.ids == vocabulary()[VIDEO])[..., None]
    embedded = embedded.masked_scatter(cells, model.model.projector(rows.features))
    # what is padded attends to itself, so that no row of scores is empty
    mask = sight(rows.part)
    out = model.model.language_model(
        inputs_embeds=embedded, attention_mask=mask, position_ids=rows.place, output_hidden_states=between
    )
    return (*out.hidden_states[:-1], out.last_hidden_state) if between else (out.last_hidden_state,)


def scores(model: Any, rows: Rows, last: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores of the words that are learned `[n, V]`, and those words `[n]`."""
    where = rows.labels[:, 1:] != IGNORED
    return model.lm_head(last[:, :-1][where]), rows.labels[:, 1:][where]


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
    target = table[[known[place] for place in PLACES]][labels.place.flatten()]
    rare = torch.full((len(target),), 0.1)
    for name, words in vectors.items():
        label = getattr(labels, name).flatten()
        rows = torch.cat(
            [table[[known[word] for word in words]], torch.zeros(NOTHING[name] + 1 - len(words), table.shape[1])]
        )
        target = target + rows[label]
        if name in _NOUNS:
            target = target + (label < NOTHING[name])[:, None] * table[known[_NOUNS[name]]]
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
    return float(loss.detach())


def train_language(
    model: Any,
    watched: Sequence[Watched],
    phases: Sequence[Phase],
    held_out: Sequence[Asked],
    seed: int = 0,
    tell: Callable[[dict[str, Any]], None] | None = None,
    notes: Notes | None = None,
) -> list[dict[str, Any]]:
    """Train the language model; the rate falls in each phase.

    Kinds that are answered worst are asked most: their share follows the errors on `held_out`.

    Returns:
        For each tenth of a phase: steps, mean loss, and the accuracy of each kind.
    """
    rng = np.random.RandomState([seed, 2])
    kinds = list(KINDS)
    missing = np.ones(len(kinds))
    log: list[dict[str, Any]] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        notes = notes or Notes(model.config.text_config.hidden_size)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    table = model.get_input_embeddings().weight
    done = 0
    for phase in phases:
        running = [*optimizers(model), torch.optim.AdamW(notes.parameters(), 3e-3, betas=(0.9, 0.98))]
        rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in running]
        losses: dict[str, float] = defaultdict(float)
        every = max(1, phase.steps // 10)
        for step in range(phase.steps):
            share = min(1.0, (step + 1) / 20) * max(0.02, 1 - (1 - phase.until) * step / phase.steps)
            for optimizer, own in zip(running, rates, strict=True):
                for group, rate in zip(optimizer.param_groups, own, strict=True):
                    group["lr"] = rate * share
            clips: list[Asked] = []
            while len(clips) < phase.clips:
                chosen = rng.choice(len(kinds), 8, replace=False, p=missing / missing.sum())
                one = watched[rng.randint(len(watched))]
                clip = draw_clip(one, rng, phase.least, phase.most, [kinds[i] for i in chosen], phase.questions)
                clips += [clip] if clip.questions else []
            rows = rows_of(clips)
            states = hidden_states(model, rows, True)
            told = notes(states, rows, targets_of(clips), table)
            told["answers"] = F.cross_entropy(*scores(model, rows, states[-1]))
            loss = told["answers"] + NOTES * sum(value for name, value in told.items() if name != "answers")
            for optimizer in running:
                optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            for optimizer in running:
                optimizer.step()
            for name, value in told.items():
                losses[name] += float(value.detach()) / every
            done += 1
            if (step + 1) % every == 0:
                accuracy = answered(model, held_out)
                missing = np.array([1.1 - accuracy.get(kind, 0.0) for kind in kinds])
                log.append({"steps": done, "losses": dict(losses), "accuracy": accuracy})
                losses.clear()
                if tell is not None:
                    tell(log[-1])
    return log


@torch.no_grad()
def answered(model: Any, clips: Sequence[Asked], together: int = 16) -> dict[str, float]:
    """Measure the share of questions a kind whose every word would be written: exact match of greedy answers."""
    right: dict[str, list[bool]] = defaultdict(list)
    for first in range(0, len(clips), together):
        part = clips[first : first + together]
        rows = rows_of(part)
        found, wanted = scores(model, rows, hidden_states(model, rows)[-1])
        hits = (found.argmax(-1) == wanted).tolist()
        at = 0
        for clip in part:
            for question in clip.questions:
                length = len(word_ids(question.answer)) + 1
                right[question.kind].append(all(hits[at : at + length]))
                at += length
    return {kind: sum(right[kind]) / len(right[kind]) for kind in KINDS if kind in right}
