"""The small model of the world: words, the recipe from end to end in small, and a session that asks it."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.commands import Run, clip, colours, run
from vmemory.data.world import COLOURS, KINDS, NUMBERS, SHAPES, View, World, ask, find
from vmemory.train.worldlm import load_worldlm, world_model, world_tokenizer
from vmemory.train.worldlm.clips import IGNORED, Asked, Watched, draw_clip, rows_of, sight
from vmemory.train.worldlm.eyes import encoded, fit_patches, pictures
from vmemory.train.worldlm.labels import THINGS, labels_of
from vmemory.train.worldlm.language import answered, hidden_states, scores
from vmemory.train.worldlm.model import frame_rows
from vmemory.train.worldlm.notes import targets_of
from vmemory.train.worldlm.optimizer import orthogonal
from vmemory.train.worldlm.words import END, VIDEO, vocabulary, word_ids

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
__all__ = ["clip", "colours", "run"]


def test_the_tokenizer_has_a_word_for_everything_the_world_says() -> None:
    tokenizer, rng = world_tokenizer(), np.random.RandomState(0)
    for seed in range(8):
        world = World(seed, 300)
        for question in ask(View(world, np.arange(280)), rng, None, 32):
            for text in (question.text, question.answer):
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                assert ids == word_ids(text)
                assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(word_ids(question.answer)) == question.answer


def test_a_session_writes_the_prompt_that_training_writes() -> None:
    import vmemory

    model, tokenizer = world_model().eval(), world_tokenizer()
    world = World(3, 40)
    session = vmemory.VideoSession(model, tokenizer, "recent", {"memory_capacities": (64,)}, fps=1.0, frame_tokens=4)
    for second, picture in enumerate(world.render(np.arange(12))):
        session.push(torch.from_numpy(picture)[None], time=[float(second)])
    [question] = ask(View(world, np.arange(12)), np.random.RandomState(0), ["now_place"], 1)
    prompt = session.prompt(question.text)
    with torch.no_grad():
        features = encoded(model.model.vision_model, torch.from_numpy(world.render(np.arange(12))))[0]
    clip = Asked(Watched(world, np.arange(12), features), np.arange(12), np.arange(12), [question])
    rows = rows_of([clip])
    asked = rows.ids[0][: rows.ids.shape[1] - int((rows.labels != IGNORED).sum())]
    assert prompt["input_ids"][0].tolist() == asked.tolist()
    with torch.no_grad():
        theirs = model(**prompt).logits[0, -1]
        ours, wanted = scores(model, rows, hidden_states(model, rows)[-1])
    # the tower ran over one frame at a time there, over twelve at once here
    assert torch.allclose(ours[0], theirs, atol=1e-4)
    assert wanted.tolist() == [*word_ids(question.answer), word_ids(END)[0]]


def test_labels_are_of_what_a_tile_shows() -> None:
    world = World(5, 80)
    labels = labels_of(world, np.arange(80))
    rows = frame_rows(torch.from_numpy(world.render()))[0].reshape(80, 16, 3, 16, 16)
    # the corner of a card's plate has one colour, and so has that of another card of the same colour
    for colour in range(8):
        corners = rows[labels.tiles // 6 == colour][:, :, 2, 2]
        if len(corners):
            assert (corners.max(0).values - corners.min(0).values).max() < 1e-5
    assert ((labels.tiles < THINGS).sum(1) == (labels.colour < 8).sum(1)).all()


def test_ridge_regression_reads_tiles_alone() -> None:
    model = world_model()
    tower = model.model.vision_model
    fit_patches(tower, 24)
    shown, labels = pictures(900, 6, 8)
    read = tower.embeddings.patch_embedding(frame_rows(shown)[0].reshape(-1, 3, 16, 16)).flatten(1)
    tile = labels.tiles.flatten()
    cards = tile < THINGS
    assert (read[cards, 8:14].argmax(1) == tile[cards] % 6).float().mean() > 0.9


def test_answers_are_judged_word_by_word() -> None:
    model = world_model()
    world = World(1, 60)
    features = torch.zeros(60, 4, model.config.vision_config.hidden_size)
    clip = draw_clip(Watched(world, np.arange(60), features), np.random.RandomState(0), 40, 40, (), 6)
    labels = rows_of([clip]).labels
    assert (labels != IGNORED).sum() == sum(len(word_ids(q.answer)) + 1 for q in clip.questions)
    accuracy = answered(model, [clip])
    assert set(accuracy) == {question.kind for question in clip.questions} <= set(KINDS)
    assert max(accuracy.values()) < 1


def test_questions_about_one_clip_do_not_see_each_other() -> None:
    model = world_model().eval()
    world = World(1, 60)
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(60, 4, model.config.vision_config.hidden_size, generator=draw)
    clip = draw_clip(Watched(world, np.arange(60), features), np.random.RandomState(0), 20, 20, (), 4)
    rows = rows_of([clip, clip._replace(questions=clip.questions[:1])])
    with torch.no_grad():
        found = scores(model, rows, hidden_states(model, rows)[-1])[0]
        apart = []
        for question in clip.questions:
            one = rows_of([clip._replace(questions=[question])])
            apart.append(scores(model, one, hidden_states(model, one)[-1])[0])
    together = torch.cat([*apart, apart[0]])
    assert torch.allclose(found, together, atol=1e-4)
    # what is padded sees the frames, so that no row of scores is empty
    assert sight(rows.part).any(-1).all()


def test_cells_tell_what_came_before() -> None:
    world = World(2, 200)
    seconds = np.arange(20, 180, 3)
    features = torch.zeros(len(seconds), 4, 8)
    clip = Asked(Watched(world, seconds, features), np.arange(len(seconds)), seconds, [])
    wanted = targets_of([clip])
    view = View(world, seconds)
    assert (wanted.new == 1).sum() == len(view.cards)
    came = {str(second) for second in seconds[[card.first for card in view.cards]].tolist()}
    words = list(vocabulary())
    assert {words[word] for word in wanted.came[wanted.new == 1].tolist()} == came
    for question in [q for kind in ("past_before",) for q in find(view, kind)]:
        colour, shape = question.text.removesuffix("?").split()[-2:]
        card = next(c for c in view.cards if view.card(c).name == f"{colour} {shape}")
        cell = 4 * card.first + int(np.flatnonzero(wanted.new.reshape(-1, 4)[card.first] == 1)[0])
        assert question.answer == f"{COLOURS[wanted.colour[cell]]} {SHAPES[wanted.shape[cell]]}"
    [last] = find(view, "past_number") or find(view, "now_number")
    assert NUMBERS[wanted.recent[-1]] == last.answer


def test_matrices_become_orthogonal() -> None:
    draw = torch.Generator().manual_seed(0)
    for shape in ((8, 8), (12, 5), (5, 12)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=draw)))
        # five steps bring them into this range, not to 1
        assert 0.5 < values.min() <= values.max() < 1.3


def said(policy: str, capacity: int, seeds: range) -> dict[str, float]:
    """Ask the shipped model at the end of worlds of a minute; return the share of right answers of each kind."""
    import vmemory

    model, tokenizer = load_worldlm()
    right: dict[str, list[bool]] = defaultdict(list)
    for seed in seeds:
        world = World(seed, 60, split="test")
        session = vmemory.VideoSession(
            model, tokenizer, policy, {"memory_capacities": (capacity,)}, fps=1.0, frame_tokens=4
        )
        session.push(torch.from_numpy(world.render()), time=[float(second) for second in range(60)])
        questions = ask(View(world, np.arange(60)), np.random.RandomState(seed), None, 32)
        answers = session.ask_all([question.text for question in questions], max_new_tokens=4)
        for question, answer in zip(questions, answers, strict=True):
            right[question.kind].append(answer.strip() == question.answer)
    return {kind: sum(own) / len(own) for kind, own in right.items()}


def test_the_shipped_model_answers_and_a_recent_window_forgets() -> None:
    everything, window = said("recent", 64, range(12)), said("recent", 8, range(12))
    now, past = ("now_colour", "now_number"), ("past_shape", "past_first_number", "past_when")
    assert min(everything[kind] for kind in (*now, *past, "past_seen")) >= 0.9
    # what is shown now is in the window, what has gone is not
    assert min(window[kind] for kind in now) >= 0.9
    assert max(window[kind] for kind in past) < 0.4


def test_the_shipped_model_answers_with_a_memory_attached() -> None:
    import vmemory

    model, tokenizer = load_worldlm()
    world, known = World(0, 60, split="test"), vocabulary()
    [question] = ask(View(world, np.arange(60)), np.random.RandomState(0), ["past_shape"], 1)
    frames = [word for second in range(60) for word in (known[str(second)], *[known[VIDEO]] * 4)]
    ids = torch.tensor([frames + word_ids(question.text)])
    rows, grid = frame_rows(torch.from_numpy(world.render()))
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": rows,
        "video_grid_thw": torch.tensor([[60, *grid[1:]]]), "video_merge_sizes": torch.tensor([2]),
        "video_compression_mask": torch.ones(240, dtype=torch.bool),
    }  # fmt: skip
    memory = ("uniform", {"memory_capacities": (30,)})
    shortened = vmemory.compress_inputs(model, inputs, *memory)
    assert shortened["input_ids"].shape[1] == ids.shape[1] - 30 * 5
    said = [model.generate(**inputs, max_new_tokens=3), model.generate(**shortened, max_new_tokens=3)]
    with vmemory.attach(model, *memory):
        said.append(model.generate(**inputs, max_new_tokens=3))
    for prompt, out in zip((ids, shortened["input_ids"], ids), said, strict=True):
        assert tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True).strip() == question.answer


@pytest.mark.slow
def test_the_recipe_runs_and_what_it_writes_loads(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("train", "worldlm", "--out", tmp_path / "m", "--scale", 0.01)
    assert code == 0
    stages = [line.partition("CPU s  ")[2].partition(":")[0] for line in out.splitlines() if " steps, " not in line]
    expected = ["tower", "watched", "unexplained", "language", "test_60", "blind_60", "test_240", "blind_240"]
    assert [stage for stage in stages if stage] == expected
    metrics = json.loads((tmp_path / "m" / "metrics.json").read_text())
    assert set(metrics["test_60"]) <= set(KINDS)
    _, tokenizer = load_worldlm(tmp_path / "m")
    assert sum((tmp_path / "m" / name).stat().st_size for name in ("model.safetensors",)) < 5e6
    assert tokenizer.decode(word_ids("[0.25, 0.0, 0.5, 0.25]")) == "[0.25, 0.0, 0.5, 0.25]"
    # a trial knows nothing, and its card says so
    assert f"| now_place (weak) | {metrics['test_60']['now_place']:.3f} |" in (tmp_path / "m" / "README.md").read_text()
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
