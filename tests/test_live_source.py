"""Cameras and network streams that fall silent, break, come back, or are none."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from tests.clips import write_clip_at
from vmemory.sources import LiveSource, SourceError, live

# the clip of two seconds as bytes, sent at once: what counts here is the connection
Sender = Callable[[socket.socket, int], None]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("live") / "a.ts"
    return write_clip_at(path, list(range(24)), codec="mpeg1video").read_bytes()


@contextmanager
def sender(send: Sender) -> Iterator[str]:
    """An address whose every connection is handed to `send`, with its number."""
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.05)
    over, workers = threading.Event(), []

    def accept() -> None:
        while not over.is_set():
            try:
                peer, _ = server.accept()
            except TimeoutError:
                continue
            peer.settimeout(5)
            workers.append(threading.Thread(target=send, args=(peer, len(workers))))
            workers[-1].start()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
    finally:
        over.set()
        thread.join()
        for worker in workers:
            worker.join()
        server.close()


def until_closed(peer: socket.socket) -> None:
    try:
        while peer.recv(1):
            pass
    except OSError:
        pass


def test_silence_at_the_door_is_told_in_time() -> None:
    with sender(lambda peer, number: until_closed(peer)) as address:
        began = time.monotonic()
        with pytest.raises(SourceError, match=r"not a live video \(silent for 0\.5 s\)"):
            LiveSource(address, timeout=0.5)
        assert time.monotonic() - began < 10


def test_a_stream_that_stalls_is_opened_again_and_its_time_goes_on(
    clip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_PAUSE", 0.05)

    def send(peer: socket.socket, number: int) -> None:
        with peer:
            peer.sendall(clip)
            if number < 2:
                until_closed(peer)

    with sender(send) as address:
        source = LiveSource(address, fps=1000.0, timeout=1.0)
        frames = list(source)
    # two connections that stall, and one that ends
    times = [frame.time for frame in frames]
    assert all(a < b for a, b in pairwise(times))
    assert times[-1] >= 2 * 1.0
    # a busy machine may have replaced some
    assert all(a.index < b.index for a, b in pairwise(frames))
    assert frames[-1].index + 1 == len(frames) + source.dropped


def test_a_stream_that_stays_silent_is_given_up(clip: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_PAUSE", 0.05)
    seen: list[int] = []

    def send(peer: socket.socket, number: int) -> None:
        seen.append(number)
        with peer:
            if number == 0:
                peer.sendall(clip)
            until_closed(peer)

    with sender(send) as address:
        source = LiveSource(address, fps=1000.0, timeout=1.0, reconnects=2)
        with pytest.raises(SourceError, match=r"silent for 1 s"):
            list(source)
    assert seen == [0, 1, 2]


def test_the_first_picture_is_not_lost_while_the_stream_is_analysed(tmp_path: Path) -> None:
    """It is the only one that says what a picture looks like; the others are changes to it."""
    path = tmp_path / "a.mp4"
    write_clip_at(path, list(range(8)))
    assert [frame.time for frame in LiveSource(path, fps=1e-3)] == [0.0]


def test_each_iteration_connects_anew(clip: bytes) -> None:
    def send(peer: socket.socket, number: int) -> None:
        with peer:
            peer.sendall(clip)

    with sender(send) as address:
        source = LiveSource(address, fps=1000.0, size=24)
        for _ in range(2):
            frames = list(source)
            assert frames[0].time == 0
            assert frames[0].image.shape == (24, 32, 3)


def test_frames_nobody_had_time_for_are_told(clip: bytes) -> None:
    def send(peer: socket.socket, number: int) -> None:
        with peer:
            for at in range(0, len(clip), len(clip) // 24):
                peer.sendall(clip[at : at + len(clip) // 24])
                time.sleep(0.02)

    with sender(send) as address:
        source = LiveSource(address, fps=1000.0)
        for _ in source:
            time.sleep(0.2)
        assert source.dropped > 0
        assert source.warning is not None
        assert f"{source.dropped} frame" in source.warning


def test_closing_ends_the_iteration(clip: bytes) -> None:
    def send(peer: socket.socket, number: int) -> None:
        with peer:
            peer.sendall(clip)
            until_closed(peer)

    with sender(send) as address:
        source = LiveSource(address, fps=1000.0, timeout=30.0)
        frames = iter(source)
        next(frames)
        threading.Timer(0.2, source.close).start()
        began = time.monotonic()
        for _ in frames:
            pass
        assert time.monotonic() - began < 20


def test_a_damaged_packet_does_not_end_a_stream(clip: bytes) -> None:
    hurt = bytearray(clip)
    hurt[len(hurt) // 2 : len(hurt) // 2 + 500] = bytes(500)

    def send(peer: socket.socket, number: int) -> None:
        with peer:
            peer.sendall(hurt)

    with sender(send) as address:
        assert list(LiveSource(address, fps=1000.0))


def test_pictures_are_turned_as_a_file_s_are(tmp_path: Path) -> None:
    path = write_clip_at(tmp_path / "a.mp4", list(range(30)), codec="mpeg4")
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], dtype=">i4").tobytes()
    path.write_bytes(data)
    assert next(iter(LiveSource(path))).image.shape == (64, 48, 3)


def test_a_stream_without_pictures(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(SourceError, match="no video stream"):
        LiveSource(tmp_path / "a.wav")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("a", 0), ValueError, "fps: expected a number > 0"),
        ((True,), TypeError, "address: expected an address, a path or a camera's number, got True"),
        ((None,), TypeError, "address: expected"),
        ((-1,), ValueError, "address: expected a camera's number >= 0, got -1"),
        ((99,), SourceError, "/dev/video99: not a live video"),
        ((Path("/dev/null"),), SourceError, "/dev/null: not a live video"),
        ((Path("tcp://127.0.0.1:9"),), SourceError, "tcp://127.0.0.1:9: not a live video"),
        (("tcp://me:word@127.0.0.1:9",), SourceError, "^tcp://127.0.0.1:9: not a live video"),
    ],
)
def test_bad_sources(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LiveSource(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"timeout": 0}, {"timeout": float("nan")}, {"reconnects": -1}])
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected"):
        LiveSource("tcp://127.0.0.1:9", **options)  # type: ignore[arg-type]
