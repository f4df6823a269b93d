from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.colours import RED, Colours, write_clip
from tests.commands import check_page
from vmemory.search.video_search import VideoSearch

ROOT = Path(__file__).parents[1]


_SLOW = """
import signal, sys, time
from pathlib import Path
# whoever runs the tests in the background of a shell hands on that interrupts are ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
from tests.colours import Colours
from vmemory.cli import app, stream
class Slow(Colours):
    def encode(self, frames):
        time.sleep(0.1)
        with open({marks!r}, "a") as marks: marks.write("x")
        return super().encode(frames)
stream.make_encoder = lambda name=None: Slow()
sys.exit(app.run({arguments!r}))
"""


def _interrupted(tmp_path: Path, arguments: list[str], after: int) -> tuple[int, str, str]:
    marks = tmp_path / "marks"
    marks.write_text("")
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW.format(marks=str(marks), arguments=arguments)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(marks.read_text()) < after and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_an_interrupt_keeps_what_was_seen(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "long.mp4", [RED] * 400)
    saved, out = tmp_path / "a.vmem", tmp_path / "out"
    options = ["--fps", "4", "--entries", "9", "--calibrate", "0", "--ask", "red"]
    code, text, err = _interrupted(
        tmp_path, ["stream", str(clip), *options, "--save", str(saved), "--out", str(out)], 3
    )
    assert code == 130
    seen = re.fullmatch(r"vmemory: interrupted after (\d+) frames; kept what was seen\n", err)
    assert seen
    assert 12 <= int(seen[1]) < 400
    assert text.startswith(f"{seen[1]} frames to ")
    assert VideoSearch.load(saved, lambda name: Colours()).bank.counts()["seen"] == int(seen[1])
    check_page(out)


def test_an_interrupt_before_the_first_frame_leaves_nothing(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "long.mp4", [RED] * 400)
    saved = tmp_path / "a.vmem"
    arguments = ["stream", str(clip), "--fps", "4", "--entries", "9", "--save", str(saved)]
    assert _interrupted(tmp_path, arguments, 2) == (130, "", "vmemory: interrupted\n")
    assert not saved.exists()
