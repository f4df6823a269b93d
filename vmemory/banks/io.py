"""Read and write `.vmem` files: safetensors with version, configuration and checksum, replaced atomically."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmemory._files import remove_stale, replacing

VERSION = 1


class BankFileError(ValueError):
    """An error for a file that is not a `.vmem` file, is truncated or changed, or has another version."""


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
        """Write a temporary file, sync it to disk, and rename it to `path`.

        Raises:
            OSError: The disk cannot be written; an old file is still there.
            ValueError: `path` is not a file.
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

    @classmethod
    def read(cls, path: Path) -> BankFile:
        """Read and check a file.

        Raises:
            BankFileError: The file is missing, is not a `.vmem` file, is truncated or changed, or has another version.
        """
        header, tensors = _contents(path)
        if header.get("format") != "vmem":
            raise BankFileError(f"{path}: not a .vmem file")
        if header.get("version") != str(VERSION):
            raise BankFileError(f"{path}: version {header.get('version')!r}, this vmemory reads version {VERSION}")
        if header.pop("checksum", None) != checksum(tensors, header):
            raise BankFileError(f"{path}: the checksum does not match, the file was altered")
        if missing := {"policy", "config", "notes"} - header.keys():
            raise BankFileError(f"{path}: not a whole .vmem file (no {', '.join(sorted(missing))})")
        parts: dict[str, dict[str, Tensor]] = {"state": {}, "extra": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind not in parts:
                raise BankFileError(f"{path}: expected tensors of state and extra, got {name!r}")
            parts[kind][rest] = tensor
        config, notes = (_values(path, name, header[name]) for name in ("config", "notes"))
        return cls(header["policy"], config, parts["state"], parts["extra"], notes)


def _contents(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read metadata and tensors of a safetensors file into memory, because a mapped file could be truncated later."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    # `exists` refuses names with NUL
    if "\0" in str(path) or not path.exists():
        raise BankFileError(f"{path}: no such file")
    if not path.is_file():
        raise BankFileError(f"{path}: expected a file, got a {'folder' if path.is_dir() else 'device or a pipe'}")
    remove_stale(path)
    try:
        data = path.read_bytes()
        tensors = load(data)
    except (SafetensorError, OSError) as error:
        raise BankFileError(f"{path}: not a whole .vmem file ({error})") from None
    except (KeyError, ValueError, AttributeError) as error:
        # of safetensors itself: a dtype that this torch does not have
        raise BankFileError(f"{path}: not a .vmem file ({type(error).__name__}: {error})") from None
    # checked by load: length in front, and whole JSON
    described = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return described.get("__metadata__") or {}, tensors


def _values(path: Path, name: str, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BankFileError(f"{path}: {name}: not JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise BankFileError(f"{path}: {name}: expected names and values, got {type(values).__name__}")
    return values


def checksum(tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    """Compute SHA-256 over names, shapes and bytes of the tensors and over the header."""
    digest = hashlib.sha256(json.dumps(sorted(header.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode("utf-8", "surrogatepass"))
        digest.update(tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
