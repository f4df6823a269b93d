"""The `.vmem` file: one safetensors file with version, configuration and checksum, replaced atomically."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmemory._files import replacing

VERSION = 1


class BankFileError(ValueError):
    """A `.vmem` file that cannot be used: not one, cut short, altered, or of another version."""


@dataclass
class BankFile:
    """Contents of a `.vmem` file.

    Attributes:
        policy: Name of the bank's policy.
        config: Arguments that make an empty bank of the same shape.
        state: The bank's state tensors by name.
        extra: Further tensors kept with it.
        notes: Further plain values kept with it.
    """

    policy: str
    config: dict[str, Any]
    state: dict[str, Tensor]
    extra: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write to a sibling, flush it to disk, then take the old file's place.

        Raises:
            OSError: The disk does not take it; an old file is still there.
            ValueError: What is there is no file.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {f"state.{name}": t.detach().cpu().contiguous() for name, t in self.state.items()}
        tensors |= {f"extra.{name}": t.detach().cpu().contiguous() for name, t in self.extra.items()}
        header = {
            "format": "vmem",
            "version": str(VERSION),
            "policy": self.policy,
            "config": json.dumps(self.config),
            "notes": json.dumps(self.notes),
        }
        header["checksum"] = checksum(tensors, header)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            try:
                save_file(tensors, partial, metadata=header)
            except SafetensorError as error:
                raise OSError(f"{path}: {error}") from None
            with partial.open("rb") as handle:
                os.fsync(handle.fileno())

    @classmethod
    def read(cls, path: Path) -> BankFile:
        """Read and check a file.

        Raises:
            BankFileError: Missing, not a `.vmem`, cut short, altered, or of another version; one line says which.
        """
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise BankFileError(f"{path}: no such file")
        try:
            with safe_open(path, framework="pt") as handle:
                header = handle.metadata() or {}
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  not a dict
        except (SafetensorError, OSError) as error:
            raise BankFileError(f"{path}: not a whole .vmem file ({error})") from None
        if header.get("format") != "vmem":
            raise BankFileError(f"{path}: not a .vmem file")
        if header.get("version") != str(VERSION):
            raise BankFileError(f"{path}: version {header.get('version')}, this vmemory reads version {VERSION}")
        if header.pop("checksum", None) != checksum(tensors, header):
            raise BankFileError(f"{path}: the checksum does not match, the file was altered")
        parts: dict[str, dict[str, Tensor]] = {"state": {}, "extra": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            parts[kind][rest] = tensor
        return cls(
            header["policy"], json.loads(header["config"]), parts["state"], parts["extra"], json.loads(header["notes"])
        )


def checksum(tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    """SHA-256 over names, shapes and bytes of the tensors and over the header."""
    digest = hashlib.sha256(json.dumps(sorted(header.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
