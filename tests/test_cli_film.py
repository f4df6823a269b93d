from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.colours import BLUE, GREEN, RED, write_clip
from tests.commands import Run, check_page, colours, expect_error, run
from vmemory.cli import demo, scores

__all__ = ["colours", "run"]


@pytest.fixture
def film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A film and a trailer of random colours, cut as the real ones are, and no need to fetch them."""
    from vmemory.data import trailer_to_film

    rng = np.random.default_rng(0)
    seconds = [tuple(colour) for colour in rng.integers(0, 256, (300, 3)).tolist()]
    film = write_clip(tmp_path / "film.mp4", [seconds[i // 4] for i in range(1200)])
    places = [trailer_to_film(i / 4) for i in range(220)]
    trailer = write_clip(tmp_path / "trailer.mp4", [(0, 0, 0) if t is None else seconds[int(t)] for t in places])
    for module in ("demo", "localize"):
        monkeypatch.setattr(f"vmemory.cli.{module}.fetch_film", lambda: film)
        monkeypatch.setattr(f"vmemory.cli.{module}.fetch_trailer", lambda: trailer)
    monkeypatch.setattr(demo, "TEXTS", ("red", "blue"))
    monkeypatch.setattr(scores, "ENTRIES", (32,))
    monkeypatch.setattr(scores, "DEMO_ENTRIES", (32,))
    monkeypatch.setattr(scores, "DUAL_ENTRIES", 15)
    monkeypatch.setattr(scores, "BUDGETS", ("64KiB",))
    monkeypatch.setattr(scores, "DTYPES", ("float16", "int4"))
    monkeypatch.setenv("VMEMORY_CACHE", str(tmp_path / "cache"))


def test_demo(run: Run, film: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, _ = run("demo", "--out", out, "--budget", "256KiB")
    assert code == 0
    assert "300 frames to 4:59" in text
    assert re.search(r"the trailer at 0:12 +\(truly at 0:18\)\n.*\n0:18 ", text)
    unbounded = re.search(r"^unbounded +(\d+) +\S+ MiB +(\d+) ", text, re.M)
    assert unbounded
    assert unbounded[1] == "600"
    assert int(unbounded[2]) >= 85
    shrunk = re.search(r"(\d+) visual tokens became (\d+)\b", text)
    assert shrunk
    assert int(shrunk[1]) > 3 * int(shrunk[2])
    page = check_page(out)
    assert "Blender Foundation" in page
    assert "Finding moments again" in page
    assert {path.name for path in out.iterdir()} == {"film.vmem", "localisation.png", "report.html", "timeline.png"}
    assert run("ask", out / "film.vmem", "red")[0] == 0


def test_localize_prints_and_draws_everything(run: Run, film: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, _ = run("localize", "--out", out)
    assert code == 0
    rows = [line for line in text.splitlines() if line.startswith("merging, 3×3")]
    assert [re.split(" {2,}", row)[0] for row in rows] == ["merging, 3×3", "merging, 3×3, int4"]
    # with and without calibration at equal entries, and at equal bytes
    assert text.count("hierarchical, all-pairs") == 3
    assert "dual, bridged, untrained" in text
    page = check_page(out)
    assert "Blender Foundation" in page
    assert "untrained" in page
    for name in ("localisation.png", "storage.png"):
        with Image.open(out / name) as picture:
            assert picture.width == 1800


def test_localize_in_the_walk(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (25, 3), np.uint8)
    paths = [tmp_path / f"P{i}.png" for i in range(25)]
    for path, colour in zip(paths, colours, strict=True):
        Image.new("RGB", (32, 18), tuple(colour.tolist())).save(path)
    # the photo before each held-out one has its colour; the last is like nothing in the walk
    held_out = {place: paths[place - 1] for place in (1, 11, 17, 20)} | {24: paths[2]}
    shown = {place: path for place, path in enumerate(paths) if place not in held_out}
    monkeypatch.setattr("vmemory.eval.walk.fetch_walk", lambda cache_dir: (shown, held_out))
    monkeypatch.setattr("vmemory.eval.walk.BUDGETS", ("8KiB",))
    code, text, _ = run("localize", "--set", "walk")
    assert code == 0
    assert re.search(r"^unbounded +20 .* 4 of 5  P2 *$", text, re.M)
    assert re.search(r"^merging, 3×3 +\d+ .* of 5", text, re.M)


def test_localize_among_shots(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shots = [RED, GREEN, BLUE]
    clip = write_clip(tmp_path / "clip.mp4", [shots[i // 10] for i in range(30)], fps=10)
    monkeypatch.setattr("vmemory.eval.bikes.fetch_bikes", lambda: clip)
    monkeypatch.setattr("vmemory.eval.bikes.CUTS", (0.0, 1.0, 2.0, 3.0))
    monkeypatch.setattr("vmemory.eval.bikes.SENTENCES", (("red", (0,)), ("blue", (0, 2)), ("green", (2,))))
    monkeypatch.setattr("vmemory.eval.bikes.BUDGETS", ("8KiB",))
    monkeypatch.setenv("VMEMORY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    code, text, _ = run("localize", "--set", "bikes")
    assert code == 0
    # green is said to be in the last shot, and is not
    assert re.search(r"^unbounded +15 .* 3 of 3 +2 of 3  green \(0:01\) *$", text, re.M)
    assert re.search(r"^recent, 9×9 +\d .* 1 of 3 .* shot 1, 2; red \(0:02\)", text, re.M)


def test_sets_that_do_not_exist(run: Run, tmp_path: Path) -> None:
    expect_error(run("localize", "--set", "cats"), "set: expected one of film, walk, bikes, got 'cats'")
    expect_error(run("localize", "--set", "walk", "--out", tmp_path), "out: only the film has a report")
