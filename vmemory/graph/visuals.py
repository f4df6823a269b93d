"""Visual tokens and pictures of a memory as bytes."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

# bytes of one memory's visual tokens or picture
MAX_VISUAL = 256 << 20
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def tokens_of(name: str, given: object) -> tuple[str, list[int], bytes]:
    """Return dtype, shape and bytes of visual tokens `[..., D]`."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a tensor [..., D], got {type(given).__name__}")
    dtype = next((known for known, of in DTYPES.items() if of == given.dtype), None)
    if dtype is None or not 1 <= given.dim() <= 4 or not given.numel():
        raise ValueError(
            f"{name}: expected tokens [..., D] of one to four axes in {', '.join(DTYPES)}, "
            f"got {given.dtype} of shape {list(given.shape)}"
        )
    if given.nbytes > MAX_VISUAL:
        raise ValueError(f"{name}: expected at most {MAX_VISUAL} bytes, got {given.nbytes}")
    flat = given.detach().cpu().contiguous().view(torch.uint8)
    return dtype, list(given.shape), flat.numpy().tobytes()


def picture_of(given: object) -> tuple[str, list[int], bytes]:
    """Return the bytes of a JPEG, PNG or WebP file, in the form of `tokens_of`."""
    if not isinstance(given, bytes):
        raise TypeError(f"picture: expected the bytes of a JPEG, PNG or WebP file, got {type(given).__name__}")
    if media_type(given) is None or len(given) > MAX_VISUAL:
        raise ValueError(
            f"picture: expected a JPEG, PNG or WebP file of at most {MAX_VISUAL} bytes, got {len(given)} bytes "
            f"that begin with {given[:8]!r}"
        )
    return "bytes", [len(given)], given


def media_type(data: bytes) -> str | None:
    """Return the media type of a picture's bytes, None for anything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    return "image/webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def visual_from(dtype: object, shape: object, data: Any) -> Tensor | bytes:
    """Return stored visual tokens or the bytes of a picture.

    Raises:
        ValueError: The stored values do not fit each other.
    """
    if dtype == "bytes":
        if not isinstance(data, bytes) or media_type(data) is None:
            raise ValueError("a picture that is none")
        return data
    sizes = json.loads(shape) if isinstance(shape, str) and len(shape) < 200 else None
    if dtype not in DTYPES or not isinstance(sizes, list) or not 1 <= len(sizes) <= 4:
        raise ValueError("visual tokens of no known kind")
    if not all(type(size) is int and 0 < size <= MAX_VISUAL for size in sizes) or not isinstance(data, bytes):
        raise ValueError("visual tokens of no known shape")
    kind = DTYPES[str(dtype)]
    if math.prod(sizes) * kind.itemsize != len(data):
        raise ValueError("visual tokens of another size than their shape")
    return torch.frombuffer(bytearray(data), dtype=kind).view(sizes)
