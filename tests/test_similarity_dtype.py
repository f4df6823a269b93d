"""Decisions of code that compares in bfloat16, beside plain loops that do so."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vmemory.banks import HierarchicalBank
from vmemory.ops import bipartite_match, merge_source

D, CAPACITY, SIDE, T = 48, (3, 4, 8), 8, 120


def film(seed: int = 0) -> Tensor:
    """Frames `[T, 8, 8, D]` in bfloat16 that drift in scenes, so that many cosines are equal once they are rounded."""
    draw = torch.Generator().manual_seed(seed)
    scene, frames = torch.zeros(SIDE, SIDE, D), []
    for t in range(T):
        if t % 20 == 0:
            scene = torch.randn(SIDE, SIDE, D, generator=draw) + 1
        scene = scene + 0.05 * torch.randn(SIDE, SIDE, D, generator=draw)
        frames.append(scene)
    return torch.stack(frames).bfloat16()


def halved(tokens: Tensor) -> Tensor:
    """Bilinear reduction of a grid to half its sides, which is the mean of 2 × 2."""
    h, w, _ = tokens.shape
    return tokens.float().unflatten(0, (h // 2, 2)).unflatten(2, (w // 2, 2)).mean((1, 3)).bfloat16()


class Released:
    """The released VideoChat-Online update on lists, comparing in the dtype of the frames."""

    def __init__(self) -> None:
        self.tiers: list[list[tuple[int, Tensor]]] = [[], [], []]

    def insert(self, tier: int, number: int, tokens: Tensor, onward: bool = True) -> None:
        held = self.tiers[tier]
        if len(held) == CAPACITY[tier]:
            means = torch.stack([kept.mean((0, 1)) for _, kept in held])
            place = int(F.cosine_similarity(means[1:], means[:-1], dim=-1).argmax())
            gone = held.pop(place)
            if onward and tier < 2:
                self.insert(tier + 1, gone[0], halved(gone[1]), onward=False)
        held.append((number, tokens))


def held_by(bank: Any) -> list[list[int]]:
    entries = bank.entries()
    return [sorted(entries.frame[entries.level == level].tolist()) for level in range(3)]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_hierarchical_bank_decides_as_the_released_code_in_bfloat16(seed: int) -> None:
    frames, released = film(seed), Released()
    arguments = {"dim": D, "grid": (SIDE, SIDE), "capacity": CAPACITY, "rule": "videochat-online"}
    rounds = HierarchicalBank(**arguments, dtype=torch.bfloat16, similarity_dtype=torch.bfloat16)
    exact = HierarchicalBank(**arguments, dtype=torch.bfloat16)
    agree = 0
    for t, frame in enumerate(frames):
        released.insert(0, t, frame)
        wanted = [sorted(number for number, _ in tier) for tier in released.tiers]
        rounds.push(frame[None])
        exact.push(frame[None])
        assert held_by(rounds) == wanted, t
        agree += held_by(exact) == wanted
    # without it most states are others, so that the loops tell the two apart
    assert agree < T / 2
    # a whole clip decides alike, also in tiers that are cut to its length
    for n in (6, T):
        again = HierarchicalBank(**arguments, dtype=torch.bfloat16, similarity_dtype=torch.bfloat16)
        again.push(frames[:n])
        assert torch.equal(rounds.compress(frames[:n]).source, again.read().source)


@pytest.mark.parametrize("rule", ["paper", "all-pairs"])
def test_the_other_rules_look_at_rounded_cosines_too(rule: str) -> None:
    frames = film()[:, :1, :1]
    # nothing leaves the second tier, so that it tells what left the first
    bank = HierarchicalBank(
        D, (1, 1), (4, T), ((1, 1), (1, 1)), rule, dtype=torch.bfloat16, similarity_dtype=torch.bfloat16
    )
    bank.push(frames)
    held: list[int] = []
    for t in range(T):
        if len(held) == 4:
            pairs = list(pairwise(held)) if rule == "paper" else list(combinations(held, 2))
            cosines = torch.stack([F.cosine_similarity(*frames[list(pair), 0, 0], dim=0) for pair in pairs])
            held.remove(pairs[int(cosines.argmax())][0 if rule == "paper" else 1])
        held.append(t)
    entries = bank.entries()
    assert entries.frame[entries.level == 0].tolist() == held


def test_the_setting_is_kept_and_checked() -> None:
    bank = HierarchicalBank(4, (2, 2), (2, 2), similarity_dtype="bfloat16")
    assert bank.to_dict()["similarity_dtype"] == "bfloat16"
    assert HierarchicalBank(**bank.to_dict() | {"dtype": torch.float32}).to_dict() == bank.to_dict()
    assert "similarity_dtype" not in HierarchicalBank(4, (2, 2), (2, 2)).to_dict()
    with pytest.raises(ValueError, match="similarity_dtype: expected one of 'bfloat16', 'float16', got 'float32'"):
        HierarchicalBank(4, (2, 2), (2, 2), similarity_dtype=torch.float32)
    with pytest.raises(ValueError, match="similarity_dtype: expected None for a bank in int8, got bfloat16"):
        HierarchicalBank(4, (2, 2), (2, 2), dtype="int8", similarity_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"similarity_dtype: expected bfloat16, float16 or None, got torch.int8"):
        bipartite_match(torch.randn(1, 4, 3), 1, similarity_dtype=torch.int8)


def tome(metric: Tensor, r: int) -> list[set[frozenset[int]]]:
    """Which tokens ToMe merges, computed in the dtype of the metric as ToMe does."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
    best, partner = scores.max(-1)
    merged = best.sort(dim=-1, descending=True, stable=True).indices[:, :r]
    made = []
    for rows, into in zip(merged.tolist(), partner.tolist(), strict=True):
        parts = {2 * j + 1: {2 * j + 1} for j in range(metric.shape[1] // 2)}
        for i in rows:
            parts[2 * into[i] + 1].add(2 * i)
        made.append({frozenset(part) for part in parts.values() if len(part) > 1})
    return made


def parts(place: Tensor) -> list[set[frozenset[int]]]:
    made = []
    for row in place.tolist():
        held: dict[int, set[int]] = {}
        for token, merged in enumerate(row):
            held.setdefault(merged, set()).add(token)
        made.append({frozenset(part) for part in held.values() if len(part) > 1})
    return made


def test_tome_matches_as_in_bfloat16() -> None:
    metric = film()[::10].flatten(1, 2)
    wanted = tome(metric, 16)
    assert parts(merge_source(bipartite_match(metric, 16, similarity_dtype=torch.bfloat16))) == wanted
    exact = parts(merge_source(bipartite_match(metric, 16)))
    assert sum(a == b for a, b in zip(exact, wanted, strict=True)) < len(wanted) / 2
