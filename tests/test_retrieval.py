"""Text-video retrieval: pooling, similarities, ranks of both directions, and a CLIP model end to end."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vmemory.compress import TempMe
from vmemory.eval import RetrievalHead, pool_frames, retrieval_scores
from vmemory.testing import random_tensor


def test_pooling_means_the_directions_of_frames_that_exist():
    frames = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [math.nan, 1.0]], [[5.0, 0.0]] * 3])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    torch.testing.assert_close(pool_frames(frames, mask), torch.tensor([[0.3, 0.9], [1.0, 0.0]]))
    torch.testing.assert_close(pool_frames(frames[1:]), torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_video_without_frames_scores_zero(dtype):
    frames = random_tensor(2, 3, 8, dtype=dtype)
    mask = torch.tensor([[False] * 3, [True] * 3])
    scores = RetrievalHead()(random_tensor(4, 8, dtype=dtype, seed=1), frames, mask)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(scores[:, 0], torch.zeros_like(scores[:, 0]))
    assert scores[:, 1].ne(0).all()


def test_similarity_is_the_scaled_cosine():
    text, frames = random_tensor(3, 8, dtype=torch.float64), random_tensor(5, 4, 8, dtype=torch.float64, seed=1)
    head = RetrievalHead(temperature=0.5).double()
    cosine = F.cosine_similarity(text[:, None], F.normalize(frames, dim=-1).mean(1)[None], dim=-1)
    torch.testing.assert_close(head(text, frames), cosine / torch.tensor(0.5).double(), rtol=1e-7, atol=0)
    torch.testing.assert_close(head(text * 7, frames * 3), head(text, frames))
    capped = RetrievalHead(temperature=0.001).double()
    torch.testing.assert_close(capped(text, frames), 100 * cosine)


def test_gradients_reach_texts_frames_and_temperature():
    head = RetrievalHead(0.5).double()
    text, frames = random_tensor(3, 6, dtype=torch.float64), random_tensor(2, 4, 6, dtype=torch.float64, seed=1)
    mask = torch.tensor([[True] * 4, [True, False, True, False]])
    text, frames = text.requires_grad_(), frames.requires_grad_()
    assert torch.autograd.gradcheck(lambda t, f, s: head(t, f, mask), (text, frames, head.logit_scale))
    head(text, frames, mask).sum().backward()
    assert torch.equal(frames.grad[1].abs().sum(-1) > 0, mask[1])
    assert head.logit_scale.grad.abs() > 0


def test_ranks_by_hand():
    similarity = torch.tensor([[9.0, 1.0, 2.0], [5.0, 4.0, 6.0], [7.0, 3.0, 8.0], [0.0, 1.0, 0.0]])
    result = retrieval_scores(similarity, torch.tensor([0, 1, 2, 1]), ks=(1, 2, 3))
    assert result.text_to_video.ranks.tolist() == [1, 3, 1, 1]
    assert result.text_to_video.recall == {1: 0.75, 2: 0.75, 3: 1.0}
    assert (result.text_to_video.median_rank, result.text_to_video.mean_rank) == (1.0, 1.5)
    # video 1 is described by texts 1 and 3, of which text 1 scores highest of all
    assert result.video_to_text.ranks.tolist() == [1, 1, 1]


def test_equal_scores_rank_by_index():
    result = retrieval_scores(torch.zeros(4, 4), ks=(1,))
    assert result.text_to_video.ranks.tolist() == result.video_to_text.ranks.tolist() == [1, 2, 3, 4]
    assert result.text_to_video.recall == {1: 0.25}
    assert result.video_to_text.median_rank == 2.5


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 10**6), st.booleans())
def test_ranks_as_a_sort_gives_them(Q, B, seed, coarse):
    similarity = random_tensor(Q, B, seed=seed)
    if coarse:
        similarity = similarity.round()
    video = torch.randint(B, (Q,), generator=torch.Generator().manual_seed(seed))
    result = retrieval_scores(similarity, video)
    scores = similarity.numpy()
    wanted = [1 + np.argsort(-row, kind="stable").tolist().index(v) for row, v in zip(scores, video, strict=True)]
    assert result.text_to_video.ranks.tolist() == wanted
    found = []
    for b in range(B):
        own = (video == b).nonzero()[:, 0].tolist()
        order = np.argsort(-scores[:, b], kind="stable").tolist()
        found += [1 + min(order.index(q) for q in own)] if own else []
    assert result.video_to_text.ranks.tolist() == found
    assert result.video_to_text.median_rank == float(np.median(found))
    assert result.text_to_video.recall[5] == np.mean(np.array(wanted) <= 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3),), "video: expected"),
        ((torch.full((2, 2), math.nan),), "similarity: expected"),
        ((torch.zeros(0, 0),), "similarity: expected"),
        ((torch.zeros(2, 2), torch.tensor([0, 2])), "video: expected values from 0 to 1, got 0 to 2"),
        ((torch.zeros(2, 2), torch.tensor([0.0, 1.0])), "video: expected int64"),
        ((torch.zeros(2, 2), None, (0,)), "ks: expected at least 1"),
        ((torch.zeros(2, 2, dtype=torch.int64),), "similarity: expected float"),
    ],
)
def test_bad_scores(arguments, message):
    with pytest.raises(ValueError, match=message):
        retrieval_scores(*arguments)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_bad_temperature(value):
    with pytest.raises(ValueError, match="temperature: expected a positive number"):
        RetrievalHead(value)


@pytest.mark.parametrize(
    ("text", "frames", "mask", "message"),
    [
        (random_tensor(2, 7), random_tensor(2, 3, 8), None, r"text: expected \[Q, 8\]"),
        (random_tensor(2, 8), random_tensor(2, 0, 8), None, "frames: expected at least 1"),
        (random_tensor(2, 8), random_tensor(2, 3, 8), torch.ones(2, 4, dtype=torch.bool), "mask: expected bool"),
        (random_tensor(2, 8), random_tensor(2, 3, 8), torch.ones(2, 3), "mask: expected bool"),
    ],
)
def test_bad_arguments(text, frames, mask, message):
    with pytest.raises(ValueError, match=message):
        RetrievalHead()(text, frames, mask)


def clip() -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=shape | {"vocab_size": 40, "max_position_embeddings": 8, "eos_token_id": 39, "bos_token_id": 38},
        vision_config=shape | {"image_size": 16, "patch_size": 4},
        projection_dim=24,
    )
    return transformers.CLIPModel(config)


def test_clip_end_to_end():
    """A tiny random CLIP, its videos merged, learns to tell six videos from their texts."""
    model = clip()
    merging = TempMe(model, 4, merge_layers="1-2", merge_frames="2-2", r=2)
    head = RetrievalHead()
    pixels = random_tensor(6, 4, 3, 16, 16)
    texts = torch.randint(38, (6, 8), generator=torch.Generator().manual_seed(0))
    texts[:, -1] = 39
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[0, 3:], mask[1, 1:] = False, False

    def similarity() -> torch.Tensor:
        return head(model.get_text_features(texts).pooler_output, merging(pixels, mask).frames, mask)

    with torch.no_grad():
        before = retrieval_scores(similarity())
    weights = {id(p): p for module in (model, merging, head) for p in module.parameters()}
    optimiser = torch.optim.AdamW(weights.values(), lr=1e-3)
    for _ in range(60):
        scores = similarity()
        loss = (F.cross_entropy(scores, torch.arange(6)) + F.cross_entropy(scores.T, torch.arange(6))) / 2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        after = retrieval_scores(similarity())
    assert before.text_to_video.recall[1] < 1
    for direction in after:
        assert direction.recall == {1: 1.0, 5: 1.0, 10: 1.0}
        assert direction.median_rank == 1
    assert all(position.abs().max() > 0 for position in merging.positions.values())
