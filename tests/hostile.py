"""Files that somebody else wrote: archives and `.vmem` files with right checksums over what no memory says."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmemory import banks

WHOLE = [0, 1, 2, 3, 5, 7, 100, -1, -5, 2**31, -(2**31), 2**40, 2**48, 2**62, 2**63 - 1, -(2**63)]
REAL = [0.0, 1.0, -1.0, 5.0, 1e300, -1e300, 1e-45, float("nan"), float("inf"), -float("inf")]
PLAIN: list[Any] = [
    None, True, 0, -1, 1, 3, 8, 10**6, 10**9, 10**18, 10**30, 1e308, float("nan"), float("inf"), "x", "9" * 5000,
    [], {},
    [1], [4, 4], [0, 0], [-1, 4], [2**40, 2**40], [10**5, 1], [[1, 1]] * 3, [[]], {"a": [{}]}, "int8", "float16",
    "complex64", "paper", "dual",
]  # fmt: skip


def mutated(x: Tensor, rng: random.Random) -> Tensor:
    """A tensor with some other values, another shape or another dtype."""
    how = rng.choice(["values"] * 6 + ["shape", "dtype", "empty"])
    if how == "shape":
        return x.flatten()[: rng.randrange(max(1, x.numel()))]
    if how == "empty":
        return x.new_zeros(0)
    if how == "dtype":
        return x.to(rng.choice([torch.float16, torch.int8, torch.bool, torch.float64, torch.int64, torch.bfloat16]))
    flat = x.clone().flatten()
    if x.is_floating_point():
        values = torch.tensor(REAL, dtype=torch.float64).to(x.dtype).tolist()
    else:
        limits = torch.iinfo(x.dtype)
        values = [value for value in WHOLE if limits.min <= value <= limits.max]
    for _ in range(rng.choice([1, 1, 2, 5]) if flat.numel() else 0):
        flat[rng.randrange(flat.numel())] = rng.choice(values)
    return flat.view(x.shape)


def rename(tensors: dict[str, Tensor], rng: random.Random) -> None:
    tensors[rng.choice(["x", "", "more", "slots.", "entry"])] = tensors.pop(rng.choice(list(tensors)))


def mutate(file: banks.BankFile, rng: random.Random) -> str:
    """Change one thing in a file's contents; what it was."""
    how = rng.choice(["config"] * 3 + ["state"] * 5 + ["extra", "delete", "rename", "policy", "notes"])
    if how == "config":
        name = rng.choice([*file.config, "adapter", "device", "policy", "self", "budget", "more"])
        file.config[name] = value = rng.choice(PLAIN)
        return f"config.{name} = {str(value)[:40]}"
    if how == "state":
        name = rng.choice(list(file.state))
        file.state[name] = mutated(file.state[name], rng)
        return f"state.{name}"
    if how == "extra" and file.extra:
        name = rng.choice(list(file.extra))
        file.extra[name] = mutated(file.extra[name], rng)
        return f"extra.{name}"
    if how == "delete":
        whole = rng.choice([file.config, file.state])
        whole.pop(rng.choice(list(whole)))
    elif how == "rename":
        rename(file.state, rng)
    elif how == "policy":
        file.policy = rng.choice([*banks.POLICIES, "none", "", "\ud7ff"])
    else:
        file.notes = {"session": rng.choice(PLAIN)}
    return how


def write_raw(path: Path, header: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """A `.vmem` file of any metadata, with the checksum that belongs to it."""
    from safetensors.torch import save_file

    from vmemory.banks.io import checksum

    save_file(tensors, path, metadata={**header, "checksum": checksum(tensors, header)})


# archives: a page of magic, payload, count, checksum and a tag of 1024 bytes; blocks of a header of 128 bytes

PAGE, HEADER = 4096, 128
MAGIC = 0x334B434C424D4556
_ONES = (1 << 64) - 1


def _mixed(hash_: int, word: int) -> int:
    hash_ = (hash_ ^ word) * 0x9E3779B97F4A7C15 & _ONES
    return hash_ ^ hash_ >> 29


def checksum(data: bytes, seed: int) -> int:
    lanes = [_mixed(seed, lane) for lane in range(4)]
    whole = len(data) // 32 * 32
    for i in range(0, whole, 32):
        lanes = [_mixed(h, word) for h, word in zip(lanes, struct.unpack_from("<4Q", data, i), strict=True)]
    rest = struct.unpack("<4Q", data[whole:].ljust(32, b"\0"))
    for lane in range(4):
        seed = _mixed(seed, _mixed(lanes[lane], rest[lane]))
    return seed


class ArchiveFile:
    """Bytes of an archive's file, to be changed block by block."""

    def __init__(self, path: Path) -> None:
        self.path, self.data = path, bytearray(path.read_bytes())
        _, self.payload, self.count, _ = struct.unpack_from("<4Q", self.data)
        self.stride = (HEADER + self.payload + 63) // 64 * 64

    def tag(self, tag: bytes, payload: int | None = None, count: int | None = None) -> None:
        """Another first page."""
        payload, count = self.payload if payload is None else payload, self.count if count is None else count
        words = MAGIC, payload & _ONES, count & _ONES
        total = checksum(tag, words[0] ^ words[1] ^ (words[2] << 20 & _ONES))
        self.data[:32], self.data[32 : 32 + 1024] = struct.pack("<4Q", *words, total), tag

    def seal(
        self, place: int, sequence: int, numbers: list[int], clock: list[float], part: int = 0, parts: int = 1,
        size: int | None = None, fill: bytes = b"x",
    ) -> None:  # fmt: skip
        """Another block, under a checksum that fits it."""
        size = self.payload if size is None else size
        payload = (fill * self.payload)[: self.payload]
        head = struct.pack("<QQ6q3dQQQ", MAGIC, sequence & _ONES, *numbers, *clock, part, parts, size & _ONES)
        total = checksum(payload[: max(size, 0)], checksum(head, 0))
        at = PAGE + place * self.stride
        self.data[at : at + HEADER + self.payload] = head + struct.pack("<QQ", total, 0) + payload

    def sealed(self, sequence_of: Callable[[int], int], numbers: list[int], **how: Any) -> None:
        """All blocks alike but for their sequence."""
        for place in range(self.count):
            self.seal(place, sequence_of(place), numbers, [1.0, 1.0, 1.0], **how)

    def write(self) -> None:
        self.path.write_bytes(self.data)


def mutate_archive(file: ArchiveFile, tiers: int, rng: random.Random) -> str:
    """Damage an archive or forge blocks of it; how."""
    how, n = rng.choice(["cut", "grow", "flip", "flip", "zero", "page", "forge", "forge", "forge"]), len(file.data)
    if how == "cut":
        del file.data[rng.choice([0, 1, 100, 4095, 4096, n // 2, n - 1]) :]
    elif how == "grow":
        file.data += b"\1" * rng.choice([1, 4096])
    elif how == "flip":
        for _ in range(rng.choice([1, 10, 200])):
            file.data[rng.randrange(n)] ^= 1 << rng.randrange(8)
    elif how == "zero":
        at = rng.randrange(n)
        file.data[at : at + 8] = bytes(len(file.data[at : at + 8]))
    elif how == "page":
        tag = (
            bytes(file.data[32 : 32 + 1024])
            if rng.random() < 0.5
            else bytes(rng.randrange(1, 256) for _ in range(1024))
        )
        file.tag(tag, rng.choice([file.payload, 0, 8, 2**62]), rng.choice([file.count, *WHOLE]))
    else:
        one_sequence = rng.random() < 0.5
        for _ in range(rng.choice([1, 2, 5, file.count])):
            numbers = [0, rng.randrange(60), 1, 1, 1, rng.randrange(-1, tiers)]
            if rng.random() < 0.5:
                numbers[rng.randrange(6)] = rng.choice(WHOLE)
            parts = rng.choice([1, 1, 2, 3, file.count])
            sequence = 7 if one_sequence else rng.choice([0, 1, 7, 59, 2**63, 2**64 - 1, rng.randrange(60)])
            clock = [rng.choice(REAL) for _ in range(3)]
            size = rng.choice([file.payload, file.payload, 0, 1, file.payload - 1])
            file.seal(rng.randrange(file.count), sequence, numbers, clock, rng.randrange(parts), parts, size)
    file.write()
    return how


def nested(depth: int) -> str:
    return json.dumps("x").join(["[" * depth, "]" * depth])
