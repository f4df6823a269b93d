"""TempMe inside a CLIP tower: its schedule, and what merged tokens and frames have to satisfy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.clip_models import SMALL, videos, vision
from vmemory.compress import MergedVideo, TempMe, tempme_schedule

pytest.importorskip("transformers", reason="transformers is not installed")


def test_schedule_of_the_papers_larger_tower():
    """127 tokens of 2,364, which the paper names without its proportions."""
    assert tempme_schedule(12, 197, r=10, proportions="40-20")[-1].tokens == 127


def test_schedule_without_merge_layers_merges_within_frames_only():
    steps = tempme_schedule(3, 9, 5, "", "", 2)
    assert [(step.join, step.cross, step.intra, step.clips, step.tokens) for step in steps] == [
        (1, 0, 2, 5, 7), (1, 0, 2, 5, 5), (1, 0, 2, 5, 3),
    ]  # fmt: skip


def test_proportions_are_whole_numbers():
    """Of 50 · 2 tokens 29 % are 29; in floating point they would be 28.999…"""
    assert tempme_schedule(1, 50, 2, "0", "2", 0, "29-0")[0].cross == 29


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge_layers": "8-9-x"}, "merge_layers: expected numbers joined by '-'"),
        ({"merge_layers": "9-8-10"}, "merge_layers: expected ascending layers from 0 to 11"),
        ({"merge_layers": (8, 9, 12)}, "merge_layers: expected ascending layers from 0 to 11"),
        ({"merge_frames": "2-2"}, "merge_frames: expected 3 numbers of at least 2"),
        ({"merge_frames": "2-2-1"}, "merge_frames: expected 3 numbers of at least 2"),
        ({"frames": 10}, "merge_frames: expected a product that divides 10 frames"),
        ({"proportions": "30"}, "proportions: expected two numbers from 0 to 100"),
        ({"proportions": "101-10"}, "proportions: expected two numbers from 0 to 100"),
        ({"r": 26}, "r: expected at most 24 in layer 0, got 26"),
        ({"r": 7}, "r: expected at most 3 in layer 6, got 7"),
        ({"r": -1}, "r: expected at least 0"),
    ],
)
def test_bad_schedules(options, message):
    with pytest.raises(ValueError, match=message):
        tempme_schedule(12, 50, **options)


def test_schedule_wants_ints():
    with pytest.raises(TypeError, match="merge_layers: expected a string"):
        tempme_schedule(12, 50, merge_layers=8)
    with pytest.raises(TypeError, match="merge_frames: expected an int"):
        tempme_schedule(12, 50, merge_frames=(2, 2.0, 3))


@torch.no_grad()
def merged(**options: Any) -> MergedVideo:
    return TempMe(vision(), **(SMALL | options))(videos())


def test_every_original_token_is_in_one_merged_token():
    out = merged()
    B, N = out.source.shape
    counted = torch.zeros(out.size.shape[:2]).scatter_add_(1, out.source, torch.ones(B, N))
    assert torch.equal(counted, out.size[..., 0])
    assert N == 6 * 17
    assert out.tokens.shape[1] == 31


@pytest.mark.parametrize(("layers", "joins", "together"), [("2-3", "3-2", 6), ("2", "3", 3), ("", "", 1)])
def test_class_tokens_keep_their_place_in_time(layers, joins, together):
    out = merged(merge_layers=layers, merge_frames=joins)
    clip = out.tokens.shape[1] // (6 // together)
    classes = out.source[:, ::17]
    assert classes.tolist() == [[t // together * clip + t % together for t in range(6)]] * 2
    assert out.size.gather(1, classes[..., None]).eq(1).all()


@torch.no_grad()
def test_frames_stay_in_order():
    """Where only the last layer joins frames, each is still most like itself in the unmerged tower."""
    model = vision()
    plain = model(videos().flatten(0, 1)).image_embeds.unflatten(0, (2, 6))
    out = TempMe(model, **(SMALL | {"merge_layers": "4", "merge_frames": "6", "r": 1}))(videos()).frames
    unit, other = (torch.nn.functional.normalize(x - x.mean(1, keepdim=True), dim=-1) for x in (out, plain))
    assert torch.equal((unit @ other.mT).argmax(-1), torch.arange(6).expand(2, 6))


@torch.no_grad()
@pytest.mark.parametrize("proportional", [True, False])
def test_merged_tokens_count_as_often_as_they_were(proportional):
    """Where all patches are alike merging loses nothing: attention notices only if a merged token counts once."""
    model = vision().double()
    model.vision_model.embeddings.position_embedding.weight[2:] = (
        model.vision_model.embeddings.position_embedding.weight[1]
    )
    pixels = torch.ones(1, 6, 3, 16, 16, dtype=torch.float64)
    plain = model(pixels[0]).image_embeds
    out = TempMe(model, **SMALL, proportional=proportional)(pixels).frames[0]
    difference = (out - plain).abs().max() / plain.abs().max()
    assert difference < 1e-12 if proportional else difference > 1e-4


@torch.no_grad()
def test_videos_do_not_see_each_other():
    merging = TempMe(vision().double(), **SMALL)
    pixels = videos(3).double()
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [False] * 6])
    for given in (None, mask):
        together = merging(pixels, given)
        for b in range(3):
            alone = merging(pixels[b : b + 1], None if given is None else given[b : b + 1])
            assert torch.equal(alone.source[0], together.source[b])
            torch.testing.assert_close(alone.frames[0], together.frames[b])


@torch.no_grad()
def test_padding_is_neither_read_nor_counted():
    merging = TempMe(vision(), **SMALL)
    pixels = videos(3)
    mask = torch.tensor([[True, True, False, True, False, True], [False] * 6, [True] * 6])
    other = pixels.clone()
    other[~mask] = torch.nan
    first, second = merging(pixels, mask), merging(other, mask)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert first.frames.isfinite().all()
    assert torch.equal(first.frames.ne(0).any(-1), mask)
    assert first.size.sum((1, 2)).tolist() == [4 * 17, 0, 6 * 17]
    # what is there says the same as without a mask
    torch.testing.assert_close(first.frames[2], merging(pixels[2:]).frames[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    model = vision(initializer_factor=1.0)
    options = SMALL | {"r": 0, "proportions": "0-10"}
    wide = TempMe(model, **options)(videos())
    low = TempMe(copy.deepcopy(model).to(dtype), **options)(videos().to(dtype))
    assert low.frames.dtype == low.tokens.dtype == dtype
    assert low.size.dtype == torch.float32
    assert torch.equal(low.size.sum((1, 2)), wide.size.sum((1, 2)))
    # merges near a tie differ, the frames all the same point the same way
    assert torch.nn.functional.cosine_similarity(low.frames.float(), wide.frames, dim=-1).min() > 0.98


@pytest.mark.parametrize(
    ("pixels", "mask", "message"),
    [
        (videos(2, 5), None, r"pixel_values: expected \[B, 6, 3, 16, 16\], got shape"),
        (videos(2, 6, 20), None, r"pixel_values: expected \[B, 6, 3, 16, 16\], got shape"),
        (videos().to(torch.uint8), None, "pixel_values: expected"),
        (videos(), torch.ones(2, 6), r"mask: expected bool \[2, 6\], got torch.float32"),
        (videos(), torch.ones(2, 5, dtype=torch.bool), r"mask: expected bool \[2, 6\]"),
    ],
)
def test_bad_videos(pixels, mask, message):
    with pytest.raises(ValueError, match=message):
        TempMe(vision(), **SMALL)(pixels, mask)
