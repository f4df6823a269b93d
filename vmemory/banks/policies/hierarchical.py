"""Tiers of decreasing resolution: recent and distinct frames are large, other frames small (VideoChat-Online)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmemory.banks.bank import Bank
from vmemory.banks.layout import check_grid, clamped, largest_entries, state_bytes
from vmemory.banks.quantization import name_of
from vmemory.banks.registry import register_policy
from vmemory.ops._checks import check_choice
from vmemory.reference.bank_layout import RULES, BankState

Grids = Sequence[tuple[int, int] | None]
HIERARCHICAL_RULES = ("paper", "videochat-online", "all-pairs")


@register_policy
class HierarchicalBank(Bank):
    """A memory with tiers of decreasing resolution: a full tier moves one of its most similar frames to the next tier.

    Rules:
        `"paper"`: the older of the closest time-adjacent pair leaves, demoted frames are area-pooled and inserted by
        time, every tier passes on what it evicts, the last drops it.
        `"videochat-online"`: the released code, quirks included: list-order adjacency, bilinear reduction, demoted
        frames appended, and what the second tier evicts is dropped instead of passed on.
        `"all-pairs"`: the VideoLLaMA3 port: the newer of the closest of all pairs leaves, cascade as above.

    Args:
        dim, grid, intervals, streams, device, dtype, key_dim, adapter: As in `Bank`.
        capacity: Entries per tier, first tier first; default (24, 24, 144).
        grid_size: Token grid per tier; default the frames' own grid, then half of the one before (at least 1).
        rule: One of the above.
        similarity_dtype: Compare frames as code does that computes in this dtype, `torch.bfloat16` or `torch.float16`:
            the means of the tokens held, norms and cosines are rounded to it, and of equal cosines the first pair
            counts. It reads every token held for each frame. None = compare in float32.
        budget: `"64MiB"` or bytes instead of `capacity`: the most entries n whose `nbytes` stay within it, split
            n/8, n/8 and 3n/4 (or n/8 per tier and the rest last).

    Raises:
        ValueError: An argument does not fit, both `capacity` and `budget` are given, or the budget holds no frame.

    Source: VideoChat-Online (arXiv 2501.00584), section on the pyramid memory bank, and its released code.
    """

    policy = "hierarchical"
    reads_tokens = True

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        capacity: Sequence[int] | None = None,
        grid_size: Grids | None = None,
        rule: str = "paper",
        *,
        similarity_dtype: torch.dtype | str | None = None,
        budget: str | int | None = None,
        intervals: Sequence[int] | None = None,
        streams: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
        key_dim: int | None = None,
        adapter: nn.Module | None = None,
    ) -> None:
        check_choice("rule", rule, HIERARCHICAL_RULES)
        if budget is not None and capacity is not None:
            raise ValueError("budget: expected either budget or capacity, got both")
        tiers = len(grid_size) if grid_size is not None else (3 if capacity is None else len(capacity))
        sizes = halving(grid, tiers) if grid_size is None else list(grid_size)
        if budget is not None:

            def nbytes(n: int) -> int:
                return state_bytes(dim, grid, split(n, tiers), sizes, rule, intervals, streams, dtype, key_dim)

            capacity = split(largest_entries(budget, tiers, nbytes), tiers)
        elif capacity is None:
            capacity = (24, 24, 144)
        super().__init__(
            dim, grid, capacity, sizes, rule, intervals=intervals, streams=streams, device=device, dtype=dtype,
            key_dim=key_dim, adapter=adapter,
        )  # fmt: skip
        self._chooses = similarity_dtype is not None
        if similarity_dtype is not None:
            name = name_of(similarity_dtype)
            check_choice("similarity_dtype", name, ("bfloat16", "float16"))
            if self.quantized:
                raise ValueError(f"similarity_dtype: expected None for a bank in {name_of(dtype)}, got {name}")
            self._similarity_dtype: torch.dtype = getattr(torch, name)
        self._config = {
            "dim": dim,
            "grid": list(grid),
            "capacity": list(capacity),
            "grid_size": [None if g is None else list(g) for g in sizes],
            "rule": rule,
            "intervals": None if intervals is None else list(intervals),
            "streams": streams,
            "dtype": name_of(dtype),
            "key_dim": self.layout.key_dim,
        }
        if similarity_dtype is not None:
            self._config["similarity_dtype"] = name_of(similarity_dtype)

    def choose(self, state: BankState, frames: Tensor, mask: Tensor | None) -> Tensor:
        rule, layout, slots = RULES[self.layout.rule], self.layout, state.order.shape[1]
        if slots != layout.slots:
            # of a short clip `compress` decides in tiers no larger than the clip
            frames_of_clip = range(1, max(layout.capacities) + 1)
            layout = next(made for n in frames_of_clip if (made := clamped(self.layout, n)).slots == slots)
        chosen = []
        for tier, (capacity, cells) in enumerate(zip(layout.capacities, layout.cells, strict=True)):
            order = state.order[:, layout.first_slot[tier] :][:, :capacity]
            if capacity < 2:
                chosen.append(torch.full_like(order[:, 0], -1))
                continue
            means = self._means(state, layout.first_row[tier], capacity, cells)
            listed = (order - layout.first_slot[tier]).clamp_min(0)
            means = means.gather(1, listed[..., None].expand_as(means))
            older, newer = torch.triu_indices(capacity, capacity, 1, device=order.device)
            if rule.choose == "adjacent":
                older, newer = older[newer == older + 1], newer[newer == older + 1]
            cosine = F.cosine_similarity(means[:, older], means[:, newer], dim=-1)
            best = cosine.argmax(1, keepdim=True)
            place = (older if rule.victim == "older" else newer)[best]
            slot = order.gather(1, place)
            if rule.nan_first:
                # the rule finds the broken frame by itself
                slot = torch.where(cosine.gather(1, best).isnan(), -1, slot)
            chosen.append(slot[:, 0])
        return torch.stack(chosen, 1)

    def _means(self, state: BankState, first_row: int, capacity: int, cells: int) -> Tensor:
        """Return the mean `[S, capacity, key_dim]` of each slot's tokens in the dtype of the comparison."""
        rows = slice(first_row, first_row + capacity * cells)
        tokens = state.slots[:, rows, : self.layout.key_dim].to(self._similarity_dtype).float()
        there = (state.mass[:, rows] > 0).unflatten(1, (capacity, cells))[..., None]
        total = torch.where(there, tokens.unflatten(1, (capacity, cells)), 0).sum(2)
        return (total / there.sum(2).clamp_min(1)).to(self._similarity_dtype)


def halving(grid: tuple[int, int], tiers: int) -> list[tuple[int, int]]:
    """Return the grid itself, then half of the one before, never below 1."""
    check_grid("grid", grid)
    sizes = [(int(grid[0]), int(grid[1]))]
    while len(sizes) < tiers:
        h, w = sizes[-1]
        sizes.append((max(1, h // 2), max(1, w // 2)))
    return sizes[:tiers]


def split(n: int, tiers: int) -> tuple[int, ...]:
    """Return n entries split over tiers: n/8 each (at least 1), the rest in the last; of three n/8, n/8, 3n/4."""
    upper = [max(1, n // 8)] * (tiers - 1)
    return (*upper, max(1, n - sum(upper)))
