"""What is pushed into a dual memory, checked and in the shape that its step takes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vmemory.banks.dual_state import DualStateHolder
from vmemory.banks.times import Times, as_times, check_seconds, on_device
from vmemory.ops._checks import check_device, check_same, check_tensor, shape_of


def own_dtype(frames: Tensor) -> AbstractContextManager[Any]:
    """Within it autocast leaves what is computed from `frames` alone: slots have the dtype of the weights."""
    kind = frames.device.type
    # asked first, because switching off what is off costs more than a hundredth of a small push
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


class DualInput(DualStateHolder):
    """Frames and times, before any state changes."""

    # set by subclasses: channels of a token, and those that weights are for; streams; what frames go through first
    dim: int
    key_dim: int
    streams: int
    adapter: nn.Module | None

    def _arrange(self, frames: Tensor, valid: Tensor | None, any_size: bool = False) -> tuple[Tensor, Tensor | None]:
        """`frames` as `[S, T, N, D]` and `valid` as `[S, T, N]`; with `any_size` of any grid and at least key_dim
        channels."""
        if not isinstance(frames, Tensor):
            raise TypeError(f"frames: expected a tensor [S, T, H, W, D] or [T, H, W, D], got {type(frames).__name__}")
        if frames.dim() not in (4, 5):
            raise ValueError(f"frames: expected [S, T, H, W, D] or [T, H, W, D], got shape {shape_of(frames)}")
        if self.adapter is not None:
            frames = self.adapter(frames)
        if frames.dim() == 4:
            frames, valid = frames[None], None if valid is None else valid[None]
        H, W = frames.shape[-3:-1] if any_size else self.grid
        D = max(frames.shape[-1], self.key_dim) if any_size else self.dim
        if frames.shape[-3:] != (H, W, D):
            raise ValueError(f"frames: expected [S, T, {H}, {W}, {D}], got shape {shape_of(frames)}")
        held, kind = self.working_tokens, frames.dtype
        if kind != held.dtype and kind.is_floating_point and torch.promote_types(kind, held.dtype) == held.dtype:
            frames = frames.to(held.dtype)
        check_same("frames", frames, "the memory", held)
        if valid is not None:
            check_tensor("valid", valid, "[S, T, H, W]")
            if valid.dtype != torch.bool or valid.shape != frames.shape[:-1]:
                wanted = shape_of(frames[..., 0])
                raise ValueError(f"valid: expected bool {wanted}, got {valid.dtype} of shape {shape_of(valid)}")
            check_device("valid", valid, "frames", frames)
            valid = valid.flatten(2)
        return frames.flatten(2, 3), valid

    def _times(self, time: Times, frames: Tensor, streams: Tensor | None, fresh: bool = False) -> Tensor:
        """`time` as `[S, T]` float64 on the device; not `fresh` = times have to exceed those held."""
        S, T = frames.shape[:2]
        if time is None:
            return torch.full((S, T), torch.nan, dtype=torch.float64, device=frames.device)
        times = as_times(time, S, T)
        check_seconds(times, None if fresh else (self.clock, self.entry >= 0), streams)
        return on_device(times, frames.device)
