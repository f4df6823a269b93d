"""Check times and streams as callers give them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vmemory.ops._checks import check_int, check_tensor, shape_of

Times = float | Sequence[float] | Tensor | None


def as_times(time: float | Sequence[float] | Tensor, streams: int, frames: int) -> Tensor:
    """Return times of T frames of S streams as `[S, T]` float64.

    Raises:
        TypeError: Not numbers.
        ValueError: Not float64, or not one number a frame.
    """
    try:
        times = time if isinstance(time, Tensor) else torch.tensor(time, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"time: expected seconds, as numbers or a float64 tensor, got {time!r}") from None
    if times.dtype != torch.float64:
        raise ValueError(f"time: expected float64 seconds, got {times.dtype}")
    if times.dim() == 0 and frames == 1:
        times = times[None]
    if times.shape not in ((frames,), (streams, frames)):
        raise ValueError(f"time: expected shape [{frames}] or [{streams}, {frames}], got {shape_of(times)}")
    return times.expand(streams, frames).contiguous()


def check_seconds(times: Tensor, held: tuple[Tensor, Tensor] | None = None, streams: Tensor | None = None) -> None:
    """Check that times are seconds that increase, as far as the host knows them.

    Args:
        times: `[S', T]` float64.
        held: Seconds `[S, M]` that they have to exceed, and which of these there are, `[S, M]` bool.
        streams: `[S']` int64, the stream of each row; nobody looks at the times of rows that are skipped.

    Raises:
        ValueError: Infinite, not increasing along the frames, or not above what its stream holds.
    """
    if times.device.type != "cpu" or not times.numel() or torch.compiler.is_compiling():
        return
    if streams is not None:
        if streams.device.type != "cpu":
            return
        fed = streams >= 0
        times, streams = times[fed], streams[fed]
    if bool(times.isinf().any()):
        raise ValueError(f"time: expected finite seconds, or NaN where unknown, got {float(times[times.isinf()][0])}")
    if held is not None and held[0].device.type == "cpu":
        seconds, live = held if streams is None else (x[streams] for x in held)
        late = live & (seconds >= times[:, :1]) if len(times) == len(seconds) else live[:0]
        if bool(late.any()):
            row = int(late.any(1).nonzero()[0])
            last = float(seconds[row][late[row]].max())
            raise ValueError(f"time: expected more than {last} s, the last seen, got {float(times[row, 0])}")
    if bool((times.diff(dim=1) <= 0).any()):
        raise ValueError("time: expected strictly increasing seconds along the frames")


def with_streams(frames: Any, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return frames `[S, T, H, W, D]` and their mask, from those of many streams or `[T, H, W, D]` of one.

    Raises:
        TypeError, ValueError: Something else.
    """
    if not isinstance(frames, Tensor):
        raise TypeError(f"frames: expected a tensor [S, T, H, W, D] or [T, H, W, D], got {type(frames).__name__}")
    if frames.dim() == 5:
        return frames, mask
    if frames.dim() != 4:
        raise ValueError(f"frames: expected [S, T, H, W, D] or [T, H, W, D], got shape {shape_of(frames)}")
    return frames[None], None if mask is None else mask[None]


def on_device(times: Tensor, device: torch.device) -> Tensor:
    """Move times to the frames' device; from the host to a CUDA device without waiting.

    Within the capture of a CUDA graph torch refuses the copy from the host, which would not be repeated.
    """
    from_host = device.type == "cuda" and times.device.type == "cpu" and times.numel() > 0
    if from_host and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing():
        return times.pin_memory().to(device, non_blocking=True)
    return times.to(device)


def as_streams(streams: Iterable[int] | Tensor, S: int) -> Tensor:
    """Return numbers of streams as int64 on the host.

    Raises:
        TypeError, ValueError: Not ints from 0 to S − 1.
    """
    if not isinstance(streams, Iterable):
        raise TypeError(f"streams: expected a sequence of ints, got {type(streams).__name__}")
    numbers = streams.tolist() if isinstance(streams, Tensor) else list(streams)
    for number in numbers:
        check_int("streams", number, low=0, high=S - 1)
    return torch.tensor(numbers, dtype=torch.int64)


def check_rows(streams: Any, S: int) -> None:
    """Check the stream of each row, `[S']` int64; where the host knows them, each below S and none twice.

    Raises:
        TypeError, ValueError: Something else; negative ones stand for rows that are skipped.
    """
    check_tensor("streams", streams, "[S]")
    if streams.dtype != torch.int64:
        raise ValueError(f"streams: expected int64, got {streams.dtype}")
    # tensors of a tracer are of another type, and have no values
    if streams.device.type == "cpu" and type(streams) is Tensor and not torch.compiler.is_compiling():
        named = [number for number in streams.tolist() if number >= 0]
        if named and max(named) >= S:
            raise ValueError(f"streams: expected less than {S}, got {max(named)}")
        if len(set(named)) < len(named):
            raise ValueError(f"streams: expected no stream twice, got {streams.tolist()}")
