"""`vmemory chat` with a tiny random model, from a file and from a stream that comes over the network."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("av")

import av

from tests.tiny_vlms import tiny
from tests.tiny_words import byte_words
from vmemory.cli.app import run
from vmemory.models.loading import load_model
from vmemory.session import VideoSession
from vmemory.sources import SourceError
from vmemory.sources.live import LiveSource

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Three seconds of 64 × 48 at 10 frames a second."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    draw = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(30):
            picture = np.repeat(np.repeat(draw.integers(0, 255, (6, 8, 3), np.uint8), 8, 0), 8, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and its tokenizer, stored as hubs store them."""
    path = tmp_path_factory.mktemp("model")
    model, _ = tiny("qwen2_5_vl")
    model.generation_config.pad_token_id = 0
    model.save_pretrained(path)
    byte_words().save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return path


def test_chat_answers_typed_questions_and_saves(capsys, monkeypatch, tmp_path, film, folder):
    monkeypatch.setattr(sys, "stdin", io.StringIO("what happens?\n\n"))
    saved = tmp_path / "film.vmem"
    arguments = ["chat", "--model", str(folder), "--video", str(film), "--fps", "10", "--tokens", "4"]
    assert run([*arguments, "--budget", "64KiB", "--save", str(saved)]) == 0
    out = capsys.readouterr().out
    assert "what happens?" in out
    assert "KiB" in out.splitlines()[-1]
    model, processor = load_model(str(folder))
    assert processor.video_processor.image_std == [0.25] * 3
    session = VideoSession.load(saved, model, processor)
    assert session.memory.counts()["seen"] == 15
    assert isinstance(session.ask("what happens?", max_new_tokens=3), str)
    assert run(["inspect", str(saved)]) == 0
    told = capsys.readouterr().out
    assert "15 seen" in told
    assert "a video session" in told


def test_chat_asks_what_the_command_line_asks(capsys, film, folder):
    arguments = ["chat", "--model", str(folder), "--video", str(film), "--bank", "recent", "--tokens", "2"]
    assert run([*arguments, "--ask", "one?", "--ask", "two?"]) == 0
    out = capsys.readouterr().out
    assert out.index("one?") < out.index("two?")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--video", "missing.mp4"], "missing.mp4: no such file"),
        (["--bank", "elastic"], "memory_policy: expected one of"),
        (["--budget", "1B"], "budget: expected at least"),
        (["--fps", "0"], "fps: expected a number > 0"),
    ],
)
def test_chat_says_in_a_line_what_is_wrong(capsys, film, folder, change, message):
    arguments = {"--model": str(folder), "--video": str(film), "--ask": "?"} | {change[0]: change[1]}
    assert run(["chat", *(part for pair in arguments.items() for part in pair)]) == 1
    # transformers shows how far it is with the weights
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vmemory:")]
    assert message in error


def test_a_live_stream_gives_its_newest_frame_and_counts_the_rest(film):
    # a sender at the pace of a camera, on this machine
    code = (
        "import av, socket, sys, time\n"
        "server = socket.create_server(('127.0.0.1', 0)); print(server.getsockname()[1], flush=True)\n"
        "peer, _ = server.accept(); out = av.open(peer.makefile('wb', 0), 'w', format='mpegts')\n"
        "video = out.add_stream('mpeg1video', rate=25); video.width, video.height, video.pix_fmt = 64, 48, 'yuv420p'\n"
        "for _ in range(4):\n"
        "    for picture in av.open(sys.argv[1]).decode(video=0):\n"
        "        fresh = av.VideoFrame.from_ndarray(picture.to_ndarray(format='rgb24'))\n"
        "        out.mux(video.encode(fresh)); time.sleep(0.01)\n"
        "out.mux(video.encode()); out.close()\n"
    )
    sender = subprocess.Popen([sys.executable, "-c", code, str(film)], stdout=subprocess.PIPE, text=True)
    assert sender.stdout is not None
    source = LiveSource(f"tcp://127.0.0.1:{int(sender.stdout.readline())}", fps=20.0)
    times = []
    for frame in source:
        times.append(frame.time)
        assert frame.image.shape == (48, 64, 3)
        time.sleep(0.15)
    sender.wait(30)
    assert len(times) >= 3
    assert all(a < b for a, b in pairwise(times))
    assert source.dropped > 0


def test_what_breaks_while_decoding_reaches_whoever_iterates(film, monkeypatch):
    source = LiveSource(str(film), fps=1000.0)

    def broken(*_, **__):
        raise MemoryError("no room for a picture")

    monkeypatch.setattr("vmemory.sources.live.Frame", broken)
    with pytest.raises(MemoryError, match="no room"):
        list(source)


def test_a_live_source_that_is_none():
    with pytest.raises(SourceError, match="not a live video"):
        LiveSource("tcp://127.0.0.1:9")
