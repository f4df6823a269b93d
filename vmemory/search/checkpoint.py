"""Check the data of a video search in its file before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vmemory.banks import parse_bytes

# the largest valid time in seconds: thirty thousand years
_LATEST = 1e12


def check_notes(notes: Mapping[str, Any], extra: Mapping[str, Tensor], dim: int) -> None:
    """Raise an error for values that `VideoSearch.save` cannot have written.

    Args:
        notes: Plain values: encoder, facts, latency, trace.
        extra: Tensors: trace, origin, `thumbnails.…`.
        dim: Channels of the memory.

    Raises:
        ValueError: A value does not fit; the message names it.
    """
    _expect(isinstance(notes["encoder"], str), "encoder", "a name", notes["encoder"])
    _check_facts(notes["facts"])
    latency, trace = notes["latency"], notes["trace"]
    fits = isinstance(latency, list) and len(latency) == 4 and _is_count(latency[0])
    _expect(fits and all(map(_is_seconds, latency[1:])), "latency", "a count and three times", latency)
    fits = isinstance(trace, list) and len(trace) == 2 and all(map(_is_count, trace)) and trace[1] > 0
    _expect(fits, "trace", "frames seen and a stride", trace)
    _expect(latency[0] == trace[0], "latency", f"{trace[0]} frames, as the trace has", latency[0])
    _check_trace(_tensor(extra, "trace", torch.float64, 2), trace[0])
    if "origin" in extra:
        origin = extra["origin"]
        fits = origin.is_floating_point() and origin.shape == (dim,) and bool(origin.isfinite().all())
        _expect(fits, "origin", f"{dim} finite numbers", f"{origin.dtype} {list(origin.shape)}")
    if any(name.startswith("thumbnails.") for name in extra):
        _check_thumbnails(extra)


def check_times(*times: Tensor) -> None:
    """Raise an error for seconds of entries that are not finite or too large."""
    for seconds in times:
        others = seconds[~(seconds.abs() <= _LATEST)].tolist()
        _expect(not others, "clock", f"seconds up to {_LATEST:g}", others)


def _check_facts(facts: Any) -> None:
    _expect(isinstance(facts, dict), "facts", "names and values", facts)
    for name in ("video", "title", "note", "attribution"):
        value = facts.get(name)
        _expect(value is None or isinstance(value, str), f"facts.{name}", "text", value)
    fps, duration, budget = (facts.get(name) for name in ("fps", "duration", "budget"))
    _expect(fps is None or (_is_seconds(fps) and fps > 0), "facts.fps", "a number > 0", fps)
    _expect(duration is None or _is_seconds(duration), "facts.duration", "seconds", duration)
    _expect(budget is None or (isinstance(budget, str | int)), "facts.budget", "a size", budget)
    if budget is not None:
        parse_bytes(budget)


def _check_trace(rows: Tensor, seen: int) -> None:
    fits = rows.shape[1] == 3 and (len(rows) > 0) == (seen > 0) and len(rows) <= seen and bool(rows.isfinite().all())
    _expect(fits, "trace", f"finite rows of 3 for {seen} frames", list(rows.shape))
    number, time, nbytes = rows.unbind(1)
    in_order = bool((number.diff() > 0).all() and (time.diff() >= 0).all())
    whole = bool((number == number.round()).all() and (number >= 0).all() and (number < 2**53).all())
    _expect(in_order and whole, "trace", "frames in order", rows[:, :2].tolist())
    _expect(bool((nbytes >= 0).all()), "trace", "bytes >= 0", nbytes.tolist())
    check_times(time)


def _check_thumbnails(extra: Mapping[str, Tensor]) -> None:
    kinds = {"frame": torch.int64, "time": torch.float64, "offset": torch.int64, "jpeg": torch.uint8}
    frame, time, offset, data = (_tensor(extra, f"thumbnails.{name}", kind, 1) for name, kind in kinds.items())
    fits = len(frame) == len(time) == len(offset) - 1 and bool((frame.diff() > 0).all())
    _expect(fits, "thumbnails.frame", "a number, a time and a place for each", [len(frame), len(time), len(offset)])
    fits = int(offset[0]) == 0 and int(offset[-1]) == len(data) and bool((offset.diff() > 0).all())
    _expect(fits, "thumbnails.offset", f"places from 0 to {len(data)}", offset.tolist())
    check_times(time)


def _tensor(extra: Mapping[str, Tensor], name: str, dtype: torch.dtype, dims: int) -> Tensor:
    tensor = extra.get(name)
    if tensor is None or tensor.dtype != dtype or tensor.dim() != dims:
        got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"{name}: expected {dtype} of {dims} dimension{'s' if dims > 1 else ''}, got {got}")
    return tensor


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _LATEST


def _expect(fits: bool, name: str, expected: str, got: object) -> None:
    if not fits:
        text = repr(got)
        raise ValueError(f"{name}: expected {expected}, got {text if len(text) <= 60 else text[:60] + '…'}")
