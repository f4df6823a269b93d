"""MovieChat: fragments of a film, each merged down to a few frames, one after the other in the long memory."""

from __future__ import annotations

import torch

from tests.recordings import Case
from vmemory.compress import FragmentMerge


def check(case: Case) -> None:
    if not case.holds("frames", "long_memory") or "short_memory_merge" not in case.facts:
        case.skip("no check of what is read, nor of the path without fragments")
    if case.facts["n_frame"] > case.facts["short_memory_length"]:
        case.skip("no check of a queue shorter than a fragment")
    frames = case.tensors["frames"][:, : case.facts["n_frame"], None]
    merged = FragmentMerge(case.facts["short_memory_merge"])(frames)
    long = case.tensors["long_memory"]
    torch.testing.assert_close(merged.frames.flatten(0, 1)[:, 0], long, rtol=0, atol=1e-6)
    for fragment, facts in enumerate(case.facts["fragments"]):
        start = facts["entries_frames"][0][0]
        spans = [[entry[0] - start, entry[-1] - start] for entry in facts["entries_frames"]]
        assert torch.stack([merged.first[fragment], merged.last[fragment]], 1).tolist() == spans
