from __future__ import annotations

import re
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.colours import write_clip
from tests.commands import Run, check_page, colours, run
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
    monkeypatch.setattr(scores, "DUAL_ENTRIES", 15)
    monkeypatch.setattr(scores, "BUDGETS", ("64KiB",))
    monkeypatch.setattr(scores, "DTYPES", ("float16", "int4"))
    monkeypatch.setenv("VMEMORY_CACHE", str(tmp_path / "cache"))


def test_demo(run: Run, film: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, _ = run("demo", "--out", out, "--budget", "256KiB")
    assert code == 0
    assert "300 frames to 4:59" in text
    assert re.search(r"^picture of the trailer at 0:12 \(truly at 0:18\): 0:18, ", text, re.M)
    table = text[text.index("\nmemory ") :].splitlines()[2:]
    assert 3 <= len(list(takewhile(lambda line: not line.startswith("found"), table))) <= 12
    unbounded = re.search(r"^unbounded +(\d+) +\S+ MiB +(\d+) ", text, re.M)
    assert unbounded
    assert unbounded[1] == "600"
    assert int(unbounded[2]) >= 85
    assert text.splitlines()[-1] == f"report: {out / 'report.html'}"
    shrunk = re.search(r"memory holds (\d+) of (\d+) visual tokens", text)
    assert shrunk
    assert 3 * int(shrunk[1]) < int(shrunk[2]) == 2400
    judged = re.findall(r"^(right|wrong)  \S", text, re.M)
    # one question of each kind, and those about now are mostly answered
    assert len(judged) >= 14
    now = re.search(r"^right: (\d+) of (\d+) about now", text, re.M)
    assert now
    assert int(now[1]) >= 0.4 * int(now[2])
    rows = re.findall("<tr(?: class=.wrong.)?><td>[^<]+\\?</td>", (out / "report.html").read_text())
    assert len(rows) > len(judged)
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
