"""The small model of the world: words, the recipe from end to end in small, and a session that asks it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.commands import Run, clip, colours, run
from vmemory.data.world import KINDS, View, World, ask
from vmemory.train.worldlm import load_worldlm, world_model, world_tokenizer
from vmemory.train.worldlm.eyes import encoded, fit_patches, pictures
from vmemory.train.worldlm.labels import THINGS, labels_of
from vmemory.train.worldlm.language import Asked, Watched, answered, draw_clip, rows_of, scores
from vmemory.train.worldlm.model import frame_rows
from vmemory.train.worldlm.optimizer import orthogonal
from vmemory.train.worldlm.words import END, word_ids

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
    ids, labels, _ = rows_of([clip])
    asked = ids[0][: len(ids[0]) - int((labels != -100).sum())]
    assert prompt["input_ids"][0].tolist() == asked.tolist()
    with torch.no_grad():
        theirs = model(**prompt).logits[0, -1]
        ours, wanted = scores(model, ids, labels, features.flatten(0, 1))
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
    _, labels, _ = rows_of([clip])
    assert (labels != -100).sum() == sum(len(word_ids(q.answer)) + 1 for q in clip.questions)
    accuracy = answered(model, [clip])
    assert set(accuracy) == {question.kind for question in clip.questions} <= set(KINDS)
    assert max(accuracy.values()) < 1


def test_matrices_become_orthogonal() -> None:
    draw = torch.Generator().manual_seed(0)
    for shape in ((8, 8), (12, 5), (5, 12)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=draw)))
        # five steps bring them into this range, not to 1
        assert 0.5 < values.min() <= values.max() < 1.3


@pytest.mark.slow
def test_the_recipe_runs_and_what_it_writes_loads(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("train", "worldlm", "--out", tmp_path / "m", "--scale", 0.01)
    assert code == 0
    assert out.count("CPU s") == 6
    metrics = json.loads((tmp_path / "m" / "metrics.json").read_text())
    assert set(metrics["test_60"]) <= set(KINDS)
    model, tokenizer = load_worldlm(tmp_path / "m")
    assert sum((tmp_path / "m" / name).stat().st_size for name in ("model.safetensors",)) < 5e6
    assert tokenizer.decode(word_ids("[0.25, 0.0, 0.5, 0.25]")) == "[0.25, 0.0, 0.5, 0.25]"
    assert f"| now_place | {metrics['test_60']['now_place']:.3f} |" in (tmp_path / "m" / "README.md").read_text()
    assert next(model.parameters()).dtype == torch.bfloat16
