"""VideoLLaMA3: its pruner of still tokens, and how it merges neighbouring ones."""

from __future__ import annotations

import torch

from tests.recordings import Case
from vmemory.compress import PixelDifference, pixel_difference
from vmemory.ops import grid_pool
from vmemory.testing import assert_within_budget


def check(case: Case) -> None:
    if case.holds("frames01", "mask", "diff"):
        check_pruning(case)
    elif case.holds("y") and "merge_sizes" in case.facts:
        check_merging(case)
    else:
        case.skip()


def check_pruning(case: Case) -> None:
    facts, tensors = case.facts, case.tensors
    [(T, h, w)], merge, threshold = facts["grid"], facts["merge"], facts["threshold"]
    H, W = h // merge, w // merge
    frames = (tensors["frames01"].float() - 0.5) / 0.5
    difference = pixel_difference(frames[None], (H, W))[0].flatten(1)
    # the stored frames were rounded to float16: half a step of the largest, in both frames, in normalised grey levels
    error = (difference - tensors["diff"]).abs().max()
    assert error <= 2 * 255 * 2 * 2**-12
    # a frame's fate is clear where none of its tokens lies so close to the threshold
    clear = torch.cat([torch.ones(1, dtype=torch.bool), ((tensors["diff"] - threshold).abs() > error).all(1)])
    tokens = torch.zeros(T, H, W, 1)
    reducer = PixelDifference(threshold)
    mask, wanted = reducer.mask(tokens, pixels=frames).flatten(1), tensors["mask"].view(T, H * W)
    assert clear[1:].any()
    assert torch.equal(mask[clear], wanted[clear])
    assert torch.equal(mask.sum(1)[clear], torch.tensor(facts["kept_per_frame"])[clear])
    assert torch.equal(reducer(tokens, pixels=frames).source, mask.flatten().nonzero().flatten())


def check_merging(case: Case) -> None:
    """Rows of a window lie next to each other; the original's interpolation is their mean."""
    run, done = case.tensors, 0
    for i, merge in enumerate(case.facts["merge_sizes"]):
        windows = run[f"h{i}"].unflatten(0, (-1, merge, merge))
        merged = run["y"][done : done + len(windows)]
        pooled, wide = grid_pool(windows, 1), grid_pool(windows.double(), 1)
        assert_within_budget(pooled.flatten(0, 2), merged, wide.flatten(0, 2))
        done += len(windows)
    assert done == len(run["y"])
