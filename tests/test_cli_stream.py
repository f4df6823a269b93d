from __future__ import annotations

import re
import socket
import struct
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.clips import served, write_clip_at
from tests.colours import BLUE, GREEN, RED, Colours, write_clip
from tests.commands import Run, check_page, clip, colours, expect_error, run
from vmemory.banks import POLICIES, BankFile
from vmemory.search.video_search import VideoSearch

__all__ = ["clip", "colours", "run"]


def test_stream_answers_saves_and_reports(run: Run, clip: Path, tmp_path: Path) -> None:
    picture, saved, out = tmp_path / "green.png", tmp_path / "new" / "clip.vmem", tmp_path / "out"
    Image.new("RGB", (50, 40), GREEN).save(picture)
    code, text, err = run(
        "stream",
        clip,
        "--fps",
        2,
        "--budget",
        "64KiB",
        "--ask",
        "blue",
        "--image",
        picture,
        "--save",
        saved,
        "--out",
        out,
    )
    assert (code, err) == (0, "")
    assert "36 frames to 0:17" in text
    tables = text.split("picture green.png")
    at = [int(m) for table in tables for m in re.findall(r"^ *0:(\d\d) ", table, re.M)[:1]]
    assert 12 <= at[0] < 18
    assert 6 <= at[1] < 12
    with Image.open(out / "timeline.png") as timeline:
        assert timeline.width == 1800
    page = check_page(out)
    assert "“blue”" in page
    assert "What 64 KiB remembers of clip.mp4" in page
    memory = VideoSearch.load(saved, lambda name: Colours())
    assert memory.bank.nbytes <= 64 * 1024
    assert memory.bank.counts()["seen"] == 36
    assert memory.facts == {"video": "clip.mp4", "fps": 2.0, "budget": "64KiB", "duration": pytest.approx(18.0)}


@pytest.mark.parametrize("bank", sorted(POLICIES))
def test_every_bank_streams_saves_and_answers(run: Run, clip: Path, tmp_path: Path, bank: str) -> None:
    saved = tmp_path / "a.vmem"
    code, text, err = run(
        "stream", clip, "--bank", bank, "--entries", 5, "--ask", "blue", "--out", tmp_path, "--save", saved
    )
    assert (code, err) == (0, "")
    assert "18 frames to 0:17, 5 entries held" in text
    page = check_page(tmp_path)
    assert BankFile.read(saved).policy == bank
    code, again, err = run("ask", saved, "blue", "--out", tmp_path / "again")
    assert (code, err) == (0, "")
    assert again.split("report:")[0].rstrip().endswith(text[text.index("blue") : text.index("report:")].rstrip())
    check_page(tmp_path / "again")
    # the weights of a dual memory are the only ones that nobody trained, and it is said wherever it answers
    assert [("nobody trained" in told) for told in (text, page, again)] == [bank == "dual"] * 3


def test_the_dual_memory_answers_from_its_slots(run: Run, clip: Path, tmp_path: Path) -> None:
    saved = tmp_path / "a.vmem"
    code, text, _ = run(
        "stream", clip, "--bank", "dual", "--rule", "bridged", "--entries", 15, "--dtype", "float32", "--calibrate", 0,
        "--ask", "blue", "-k", 1, "--save", saved,
    )  # fmt: skip
    assert code == 0
    # the last six frames are blue, and of what was held before the working memory's three untrained slots say the same
    assert re.search(r"^ *0:1[2-7] .* [12]  blue", text, re.M)
    memory = VideoSearch.load(saved, lambda name: Colours())
    assert memory.bank.capacities == (3, 12)
    assert memory.bank.to_dict()["rule"] == "bridged"
    assert memory.bytes_in_use <= memory.bank.nbytes
    held = memory.bank.entries()
    assert held.frame[held.level == 0].tolist() == [15, 16, 17]
    blue = memory.find(np.full((18, 32, 3), BLUE, np.uint8), 1)[0]
    assert (blue.time >= 12, blue.thumbnail is not None) == (True, True)
    assert blue.score == pytest.approx(1, abs=1e-3)
    history = memory.history
    assert (history.entry[-3:] >= 0).all()


def test_help_names_every_policy(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = run("stream", "--help")[1]
    listed = re.search(r"Policy: ([a-z, ]+)\.", shown)
    assert listed
    assert listed[1].split(", ") == list(POLICIES)


def test_tokens_that_an_entry_keeps(run: Run, clip: Path, tmp_path: Path) -> None:
    for options, grid in (([], (3, 3)), (["--keep", 9], (9, 9)), (["--keep", 1], (1, 1))):
        assert run("stream", clip, "--entries", 4, *options, "--save", tmp_path / "a.vmem")[0] == 0
        memory = VideoSearch.load(tmp_path / "a.vmem", lambda name: Colours())
        assert (memory.bank.policy, memory.bank.layout.grids) == ("merging", (grid,))


def test_rules_dtypes_and_no_calibration(run: Run, clip: Path, tmp_path: Path) -> None:
    for rule in ("paper", "videochat-online", "all-pairs"):
        saved = tmp_path / f"{rule}.vmem"
        code, _, err = run(
            "stream", clip, "--bank", "hierarchical", "--rule", rule, "--entries", 8, "--dtype", "float32",
            "--calibrate", 0, "--save", saved,
        )  # fmt: skip
        assert (code, err) == (0, "")
        file = BankFile.read(saved)
        assert (file.config["rule"], file.config["dtype"]) == (rule, "float32")
        assert "origin" not in file.extra


def test_a_directory_of_pictures(run: Run, tmp_path: Path) -> None:
    for i, colour in enumerate([RED, GREEN, BLUE]):
        Image.new("RGB", (32, 18), colour).save(tmp_path / f"{i}.png")
    code, text, err = run("stream", tmp_path, "--ask", "green", "-k", 1)
    assert (code, err) == (0, "")
    assert re.search(r"^ *0:01 ", text, re.M)


def test_a_truncated_video_keeps_what_decodes(run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = write_clip(tmp_path / "whole.mkv", [tuple(c) for c in rng.integers(0, 255, (200, 3)).tolist()])
    short = tmp_path / "short.mkv"
    short.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    code, text, err = run("stream", short, "--entries", 9, "--out", tmp_path / "out")
    assert code == 0
    assert err.startswith("vmemory: warning: ")
    assert err.count("\n") == 1
    kept = re.search(r"\((\d+) frames kept\)", err)
    assert kept
    assert text.startswith(f"{kept[1]} frames to ")
    assert 5 <= int(kept[1]) <= 45
    assert "frames kept" in check_page(tmp_path / "out")


def test_unusable_videos(run: Run, clip: Path, tmp_path: Path) -> None:
    text, empty, sound = tmp_path / "a.mp4", tmp_path / "empty.mp4", tmp_path / "sound.wav"
    text.write_text("not a video, but long enough to be looked at\n" * 50)
    empty.write_bytes(b"")
    with av.open(str(sound), "w") as container:
        track = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
        frame.rate = 8000
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clip.read_bytes()[:700])
    (tmp_path / "folder").mkdir()
    out = tmp_path / "out"
    for video, message in (
        (tmp_path / "none.mp4", r"none\.mp4: no such file"),
        (text, r"a\.mp4: not a "),
        (empty, r"empty\.mp4: not a readable video"),
        (sound, r"sound\.wav: no video stream"),
        (cut, r"cut\.mp4: "),
        (tmp_path / "folder", "folder: no images"),
    ):
        expect_error(run("stream", video, "--out", out, "--save", tmp_path / "a.vmem"), message)
    assert not out.exists()
    assert not (tmp_path / "a.vmem").exists()


def test_wrong_options(run: Run, clip: Path, tmp_path: Path) -> None:
    file, picture = tmp_path / "file", tmp_path / "no.png"
    file.write_text("x")
    picture.write_text("x")
    for options, message in (
        (["--bank", "best"], rf"bank: expected one of {', '.join(POLICIES)}, got 'best'"),
        (["--bank", "merging", "--rule", "paper"], "rule: only the hierarchical bank and the dual one have rules"),
        (["--bank", "hierarchical", "--rule", "best"], "rule: expected one of"),
        (["--bank", "dual", "--rule", "best"], "rule: expected one of"),
        (["--bank", "dual", "--dtype", "int8"], "dtype: expected a floating dtype, got 'int8'"),
        (["--bank", "dual", "--keep", 3], "keep: the dual bank has sizes of its own, got 3"),
        (["--keep", 10], "keep: expected 1 to 9 tokens a side, got 10"),
        (["--budget", "100B"], r"budget: expected at least .* for the smallest memory"),
        (["--budget", "much"], "budget: expected a size such as '64MiB'"),
        (["--budget", "1MiB", "--entries", 4], "budget, entries: expected one of them, got both"),
        (["--bank", "hierarchical", "--entries", 2], "entries: expected at least 3"),
        (["--bank", "recent", "--entries", 0], "entries: expected at least 1"),
        (["--dtype", "int3"], "dtype: expected one of float16, float32, int8, int4, got 'int3'"),
        (["--fps", 0], "fps: expected a number > 0"),
        (["--image", tmp_path / "none.png"], r"none\.png: no such file"),
        (["--image", picture], r"no\.png: not a picture"),
        (["--out", file], "file: not a directory"),
        (["--save", tmp_path], "is a directory"),
        (["--save", file / "a.vmem"], "file: not a directory"),
    ):
        expect_error(run("stream", clip, *options), message)
    for arguments, message in (
        (["stream", clip, "-k", 0], "-k"),
        (["stream", clip, "--fast"], "--fast"),
        (["stream"], "(?i)missing argument .*video"),
        (["watch"], "watch"),
    ):
        expect_error(run(*arguments), message, code=2)


def test_a_failed_run_leaves_the_old_files(
    run: Run, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "clip.vmem"
    run("stream", clip, "--entries", 9, "--save", saved, "--out", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"clip.vmem", "report.html", "timeline.png"}

    def no_space(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device", str(saved))

    monkeypatch.setattr("safetensors.torch.save_file", no_space)
    result = run("stream", clip, "--entries", 5, "--save", saved, "--out", tmp_path)
    expect_error(result, r"clip\.vmem: No space left on device")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_address_of_a_film_is_that_film(run: Run, clip: Path) -> None:
    code, there, err = run("stream", clip, "--ask", "blue")
    assert (code, err) == (0, "")
    with served(clip.parent) as address:
        code, over_http, err = run("stream", f"{address}/clip.mp4", "--ask", "blue")
        assert (code, err) == (0, "")
        expect_error(run("stream", f"{address}/none.mp4"), rf"{address}/none\.mp4: not a readable video file")

    def without_milliseconds(text: str) -> str:
        return re.sub(r"a frame: .*", "", text)

    assert without_milliseconds(over_http) == without_milliseconds(there)


@pytest.mark.parametrize("calibrate", [0, 0.2])
def test_a_camera_that_goes_away_leaves_what_it_gave(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrate: float
) -> None:
    monkeypatch.setattr("vmemory.sources.live._PAUSE", 0.01)
    data = write_clip_at(tmp_path / "a.ts", list(range(24)), codec="mpeg1video").read_bytes()
    server = socket.create_server(("127.0.0.1", 0))

    def send() -> None:
        peer, _ = server.accept()
        with peer:
            for at in range(0, len(data), len(data) // 24):
                peer.sendall(data[at : at + len(data) // 24])
                time.sleep(0.02)
            # goes without a word
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            server.close()

    sender = threading.Thread(target=send)
    sender.start()
    saved = tmp_path / "a.vmem"
    place = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    code, out, err = run("stream", place, "--fps", 50, "--entries", 4, "--save", saved, "--calibrate", calibrate)
    sender.join()
    assert code == 0
    assert re.match(r"vmemory: warning: .*tcp://127\.0\.0\.1:\d+: not a live video \(Connection refused\)\n", err)
    seen = re.match(r"(\d+) frames to 0:00", out)
    assert seen
    assert VideoSearch.load(saved, lambda name: Colours()).bank.counts()["seen"] == int(seen[1]) > 0
