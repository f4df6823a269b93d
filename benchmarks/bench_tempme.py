"""Time TempMe: its merging steps against their eager form, and a CLIP tower with and without merging."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.peers import tempme as peer
from benchmarks.timing import Rotation
from vmemory.compress import MergeStep, TempMe, tempme, tempme_schedule
from vmemory.ops import bipartite_match, token_merge
from vmemory.testing import assert_within_budget, random_tensor

FRAMES, WIDTH, HEADS = 12, 768, 12
# name, patch size, r, proportions: the settings of the paper's two towers
TOWERS = [("ViT-B/32", 32, 2, "30-10"), ("ViT-B/16", 16, 10, "40-20")]


def schedule(patch: int, r: int, proportions: str) -> tuple[MergeStep, ...]:
    return tempme_schedule(12, (224 // patch) ** 2 + 1, FRAMES, r=r, proportions=proportions)


def merge_steps(x: Tensor, steps: tuple[MergeStep, ...]) -> tuple[Tensor, Tensor]:
    """Run all merges of a tower; merges within clips compare as many channels as the keys have."""
    size = None
    for step in steps:
        if step.join > 1:
            x, size = token_merge(x, bipartite_match(x, step.cross, cls=step.cls // step.join, groups=step.join), size)
        if step.intra:
            plan = bipartite_match(x[..., : WIDTH // HEADS], step.intra, cls=step.cls)
            x, size = token_merge(x, plan, size)
    assert size is not None
    return x, size


def steps_case(name: str, patch: int, r: int, proportions: str, videos: int) -> Case:
    steps, first = schedule(patch, r, proportions), FRAMES * ((224 // patch) ** 2 + 1)
    # a video's tokens before and after every merge, and the scored pairs
    tokens, moved, flops = first, 0, 0.0
    for step in steps:
        for merges, channels in ((step.cross, WIDTH), (step.intra, WIDTH // HEADS)):
            if merges:
                pairs = step.clips * ((tokens // step.clips - step.cls) / 2) ** 2
                flops += 2 * pairs * channels + 2 * tokens * WIDTH
                moved += tokens + (tokens := tokens - step.clips * merges)
    return Case(
        f"{name}, {videos} videos: {first:,} to {tokens:,} tokens each",
        lambda clips: (clips, first // FRAMES, WIDTH),
        lambda x: merge_steps(x, steps),
        lambda x: peer.merge_steps(x, steps, WIDTH // HEADS),
        moved / first - 1,
        flops / (first * WIDTH),
        frames=FRAMES * videos,
    )


@pytest.mark.parametrize("case", [steps_case(*tower, 8) for tower in TOWERS], ids=lambda case: case.name)
@pytest.mark.benchmark(group="tempme: all merges of a tower, joining of clips included")
def test_merging_steps(race, case):
    race(case)


def tower_flops(patch: int, steps: tuple[MergeStep, ...]) -> float:
    """Return the multiplications and additions of the products of one video."""
    patches = (224 // patch) ** 2
    flops = 2.0 * FRAMES * patches * 3 * patch**2 * WIDTH
    for step in steps:
        attended = step.tokens + step.intra
        products = 8 * attended * WIDTH**2 + 4 * attended**2 * WIDTH + 16 * step.tokens * WIDTH**2
        flops += step.clips * products
    return flops


@torch.no_grad()
def check(merging: TempMe, pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that merges and embeddings equal those of plain PyTorch."""
    ours = merging(pixels)
    wide = copy.deepcopy(merging).double()(pixels.double())
    with monkeypatch.context() as patched:
        patched.setattr(tempme, "bipartite_match", partial(bipartite_match, impl="reference"))
        patched.setattr(tempme, "token_merge", partial(token_merge, impl="reference"))
        plain = merging(pixels)
    assert torch.equal(ours.source, plain.source)
    assert_within_budget(tuple(ours[:3]), tuple(plain[:3]), tuple(wide[:3]))


@pytest.mark.parametrize(("name", "patch", "r", "proportions"), TOWERS, ids=[name for name, *_ in TOWERS])
@pytest.mark.benchmark(group="tempme: a CLIP tower and 12 frames, merged")
def test_tower(measure, device, monkeypatch, name, patch, r, proportions):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=12,
                                           num_attention_heads=HEADS, patch_size=patch, projection_dim=512)  # fmt: skip
    model = transformers.CLIPVisionModelWithProjection(config).eval().to(device)
    merging = TempMe(model, FRAMES, r=r, proportions=proportions)
    pixels = random_tensor(1, FRAMES, 3, 224, 224, device=device)
    check(merging, pixels, monkeypatch)

    @torch.no_grad()
    def ours(pixels: Tensor) -> Tensor:
        return merging(pixels).frames

    @torch.no_grad()
    def unmerged(pixels: Tensor) -> Tensor:
        return model(pixels.flatten(0, 1)).image_embeds

    everything = tempme_schedule(12, (224 // patch) ** 2 + 1, FRAMES, "", "", 0)
    flops, before = tower_flops(patch, merging.schedule), tower_flops(patch, everything)
    moved = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    label = f"{name}, operations of the unmerged ÷ {before / flops:.2f}"
    measure(label, ours, Rotation(pixels), moved, flops, unmerged=unmerged)
