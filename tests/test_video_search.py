from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.colours import BLUE, GREEN, GREY, RED, Colours, frames_of
from vmemory.banks import POLICIES, BankFileError, DualMemory, HierarchicalBank, MergingBank
from vmemory.search.encoder import calibrate
from vmemory.search.presets import video_bank
from vmemory.search.similar import Found, centred_search, spread
from vmemory.search.thumbnails import Thumbnails, nearest
from vmemory.search.trace import Trace
from vmemory.search.video_search import VideoSearch
from vmemory.sources import Frame

FILM = [RED] * 10 + [GREEN] * 10 + [BLUE] * 10


def _stream(policy: str = "uniform", entries: int = 12, **options: object) -> VideoSearch:
    return VideoSearch(Colours(), video_bank(policy, 9, 4, entries=entries), **options)  # type: ignore[arg-type]


def _watch(stream: VideoSearch, frames: list[Frame], batch: int = 4) -> VideoSearch:
    for i in range(0, len(frames), batch):
        stream.push(frames[i : i + batch])
    return stream


def _noisy(seed: int, count: int) -> list[Frame]:
    colours = np.random.default_rng(seed).integers(0, 256, (count, 3))
    return frames_of([tuple(colour) for colour in colours.tolist()])


def _mean_colour(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")).mean((0, 1))


@pytest.mark.parametrize("policy", ["hierarchical", "merging", "uniform"])
def test_sentences_and_pictures_find_their_moments(policy: str) -> None:
    stream = _watch(_stream(policy), frames_of(FILM))
    for word, colour, begin in (("red", RED, 0), ("green", GREEN, 10), ("blue", BLUE, 20)):
        by_text = stream.ask(word, 3)
        by_picture = stream.find(np.full((40, 70, 3), colour, np.uint8), 3)
        for answer in (by_text[0], by_picture[0]):
            assert begin <= answer.time < begin + 10
            assert answer.start <= answer.time <= answer.stop
            assert answer.concepts[0][0] == word
            assert answer.thumbnail is not None
            np.testing.assert_allclose(_mean_colour(answer.thumbnail), colour, atol=6)
        assert [a.score for a in by_text] == sorted((a.score for a in by_text), reverse=True)


def test_answers_keep_apart() -> None:
    stream = _watch(_stream(entries=30), frames_of(FILM))
    times = [a.time for a in stream.ask("red", 8, apart=5)]
    assert len(times) >= 4
    assert all(b - a >= 5 for a, b in pairwise(sorted(times)))
    assert len(stream.ask("red", 8)) == 8
    assert len(stream.ask("red", 100)) == 30


def test_an_empty_memory_answers_nothing() -> None:
    stream = _stream()
    stream.push([])
    assert stream.ask("red") == []
    assert stream.find(np.zeros((18, 32, 3), np.uint8)) == []
    assert len(stream.history.frame) == 0
    assert stream.bytes_in_use == 0
    assert stream.latency.frames == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_every_entry_has_the_thumbnail_of_a_frame_in_its_span(policy: str) -> None:
    frames = _noisy(0, 57)
    stream = _stream(policy, 9)
    for i in range(0, len(frames), 5):
        stream.push(frames[i : i + 5])
        entries = stream.entries
        assert stream.thumbnails is not None
        # a frame that both memories of the dual one hold has one picture
        assert len(stream.thumbnails) == len(entries.first.unique())
        for place, (first, last, time) in enumerate(zip(entries.first, entries.last, entries.time, strict=True)):
            data = stream.thumbnail(entries, place)
            assert data is not None
            span = frames[int(first) : int(last) + 1]
            near = [np.abs(_mean_colour(data) - f.image[0, 0]).max() for f in span]
            assert min(near) < 6
            if first == last:
                assert span[0].time == float(time)
    assert 0 < stream.thumbnails.nbytes < 9 * 2000


def test_a_stream_without_thumbnails() -> None:
    stream = _watch(_stream(thumbnails=False), frames_of(FILM))
    assert stream.ask("red")[0].thumbnail is None


@pytest.mark.parametrize("policy", POLICIES)
def test_history_says_where_every_frame_is(policy: str) -> None:
    stream = _watch(_stream(policy, 9), _noisy(1, 50), 3)
    history, entries = stream.history, stream.entries
    assert history.frame.tolist() == list(range(50))
    assert history.time.tolist() == [float(i) for i in range(50)]
    if policy == "merging":
        assert (history.entry >= 0).all()
        assert np.bincount(history.entry).tolist() == entries.frames.tolist()
    else:
        assert history.frame[history.entry >= 0].tolist() == entries.frame.unique().tolist()
        assert (history.entry < 0).sum() == stream.bank.counts()["dropped"] > 0
    held = history.entry >= 0
    assert history.level[held].tolist() == entries.level[torch.from_numpy(history.entry[held])].tolist()
    assert (history.level[~held] == -1).all()
    assert (np.diff(history.nbytes) >= 0).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_bytes_in_use_are_those_of_the_entries(policy: str) -> None:
    stream = _watch(_stream(policy, 9), _noisy(2, 40))
    state = stream.bank.state._asdict()
    # counters are there from the first frame on
    by_entry = [
        t for name, t in state.items() if name not in ("counter", "link", "seen", "entered", "written", "overwrites")
    ]
    assert stream.bytes_in_use == sum(t.numel() * t.element_size() for t in by_entry) <= stream.bank.nbytes


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_saved_stream_answers_the_same_and_goes_on(tmp_path: Path, policy: str, calibrated: bool) -> None:
    frames = _noisy(3, 40)
    origin = calibrate(Colours(), frames[:10]) if calibrated else None
    stream = _watch(_stream(policy, 9, origin=origin, facts={"video": "noise"}), frames[:30])
    path = tmp_path / "deep" / "a.vmem"
    stream.save(path)
    names: list[str] = []

    def encoder(name: str) -> Colours:
        names.append(name)
        return Colours()

    again = VideoSearch.load(path, encoder)
    assert names == ["colours"]
    assert again.facts == {"video": "noise"}
    assert again.latency == stream.latency
    for more in ([], frames[30:]):
        _watch(stream, more)
        _watch(again, more)
        for word in ("red", "green", "blue"):
            assert again.ask(word, 4) == stream.ask(word, 4)
        assert again.find(frames[7].image) == stream.find(frames[7].image)
        for one, two in zip(again.history, stream.history, strict=True):
            np.testing.assert_array_equal(one, two)


def test_a_memory_without_a_stream_is_refused(tmp_path: Path) -> None:
    video_bank("merging", 9, 4, entries=3).save(tmp_path / "bare.vmem")
    with pytest.raises(BankFileError, match=r"bare\.vmem: a memory without a video stream"):
        VideoSearch.load(tmp_path / "bare.vmem", lambda name: Colours())


def test_a_failed_push_changes_nothing() -> None:
    stream = _watch(_stream(), frames_of(FILM[:8]))
    before = (stream.history, stream.latency, stream.ask("red"), stream.bank.counts())
    with pytest.raises(ValueError, match="time: expected"):
        stream.push(frames_of([GREEN], first=3))
    after = (stream.history, stream.latency, stream.ask("red"), stream.bank.counts())
    for one, two in zip(before[0], after[0], strict=True):
        np.testing.assert_array_equal(one, two)
    assert before[1:] == after[1:]


def test_calibration_moves_nothing_but_the_origin() -> None:
    frames = _noisy(4, 30)
    encoder = Colours()
    origin = calibrate(encoder, frames, batch=7)
    tokens = encoder.encode([frame.image for frame in frames])
    torch.testing.assert_close(origin, tokens.mean((0, 1, 2)))
    plain, moved = _watch(_stream(entries=30), frames), _watch(_stream(entries=30, origin=origin), frames)
    # float16 tokens about another origin: equal to their rounding
    torch.testing.assert_close(moved.pooled(moved.entries), tokens.mean((1, 2)), atol=2e-3, rtol=0)
    image = frames[11].image
    assert [a.frame for a in plain.find(image, 3)] == [a.frame for a in moved.find(image, 3)]
    assert plain.find(image, 1)[0].frame == 11
    with pytest.raises(ValueError, match="frames: expected at least one"):
        calibrate(encoder, [])


def test_constructor_arguments() -> None:
    with pytest.raises(ValueError, match="bank: expected one stream, got 2"):
        VideoSearch(Colours(), MergingBank(4, (9, 9), 3, streams=2))
    with pytest.raises(ValueError, match="bank: expected key_dim = dim = 4, got 3"):
        VideoSearch(Colours(), MergingBank(4, (9, 9), 3, key_dim=3))
    with pytest.raises(ValueError, match="bank: expected key_dim = dim = 4, got 2"):
        VideoSearch(Colours(), DualMemory(4, (9, 9), (1, 2), heads=2, key_dim=2))
    with pytest.raises(ValueError, match=r"origin: expected shape \[4\], got \[5\]"):
        VideoSearch(Colours(), MergingBank(4, (9, 9), 3), origin=torch.zeros(5))


def test_video_bank() -> None:
    bank = video_bank("hierarchical", 9, 8, entries=64)
    assert isinstance(bank, HierarchicalBank)
    assert bank.layout.capacities == (8, 8, 48)
    assert bank.layout.grids == ((9, 9), (3, 3), (1, 1))
    assert bank.layout.descriptors == 1
    for policy in POLICIES:
        assert video_bank(policy, 9, 8, budget="100KiB").nbytes <= 100 * 1024
    assert [video_bank("merging", 9, 8, entries=2, keep=keep).layout.grids for keep in (None, 9, 2)] == [
        ((3, 3),),
        ((9, 9),),
        ((2, 2),),
    ]
    assert video_bank("merging", 7, 8, entries=2).layout.grids == ((7, 7),)
    state = torch.random.get_rng_state()
    weights = [dict(video_bank("dual", 9, 8, entries=9).named_parameters()) for _ in range(2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    for arguments, message in (
        ({"policy": "best"}, "bank: expected one of dual, episodic, .*uniform, got 'best'"),
        ({"policy": "merging", "rule": "paper"}, "rule: only the hierarchical bank and the dual one have rules"),
        ({"policy": "hierarchical", "keep": 3}, "keep: the hierarchical bank has sizes of its own, got 3"),
        ({"policy": "merging", "keep": 0}, "keep: expected 1 to 9 tokens a side, got 0"),
        ({"policy": "dual", "entries": 1}, "entries: expected at least 2"),
        ({"policy": "hierarchical", "rule": "x"}, "rule: expected one of"),
        ({"policy": "hierarchical", "entries": 2}, "entries: expected at least 3"),
        ({"policy": "recent", "entries": None, "budget": "10B"}, "budget: expected at least"),
    ):
        with pytest.raises(ValueError, match=message):
            video_bank(**{"side": 9, "dim": 8, "entries": 9} | arguments)  # type: ignore[arg-type]


def test_search_ignores_what_all_entries_share() -> None:
    generator = torch.Generator().manual_seed(0)
    entries, queries = torch.randn(20, 8, generator=generator), torch.randn(5, 8, generator=generator)
    found = centred_search(queries, entries, 4)
    moved = centred_search(queries + 3, entries + 3, 4)
    assert torch.equal(found.entry, moved.entry)
    about = entries - entries.mean(0)
    scores = torch.cosine_similarity((queries - entries.mean(0))[:, None], about[None], dim=-1)
    torch.testing.assert_close(found.values, scores.sort(1, descending=True).values[:, :4])
    as_is = centred_search(queries, entries, 1, centre_queries=False)
    best = torch.cosine_similarity(queries[:, None], about[None], dim=-1).max(1)
    assert torch.equal(as_is.entry[:, 0], best.indices)
    nothing = centred_search(queries, entries[:0], 2)
    assert (nothing.entry == -1).all()


def test_spread() -> None:
    found = Found(torch.tensor([[0.9, 0.8, 0.7, 0.6, -torch.inf]]), torch.tensor([[2, 0, 1, 3, -1]]))
    time = torch.tensor([1.0, 5.0, 2.0, 9.0], dtype=torch.float64)
    assert spread(found, time, 5, 0.0).entry.tolist() == [[2, 0, 1, 3]]
    assert spread(found, time, 5, 2.0).entry.tolist() == [[2, 1, 3]]
    assert spread(found, time, 2, 2.0).values.tolist() == found.values[:, [0, 2]].tolist()


def test_trace_is_bounded_and_even() -> None:
    trace = Trace(2, limit=10)
    for i in range(1000):
        trace.append(i, 2 * i)
        steps = np.diff(trace.rows[:, 0])
        assert len(trace.rows) <= 10
        assert (steps == trace.stride).all()
    assert trace.rows[0].tolist() == [0, 0]
    assert trace.rows[-1, 0] > 1000 - 2 * trace.stride
    with pytest.raises(ValueError, match="row: expected 2 numbers, got 1"):
        trace.append(1)
    with pytest.raises(ValueError, match="limit: expected at least 2, got 1"):
        Trace(1, limit=1)


def test_nearest_frame_of_a_span() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        frames = np.sort(rng.choice(40, rng.integers(0, 12), replace=False))
        seconds = frames + rng.random() * 0.5
        edges = np.sort(rng.choice(41, 8, replace=False))
        first, last = edges[::2], edges[1::2]
        time = rng.uniform(first, last)
        got = nearest(frames, seconds, first, last, time)
        for place in range(4):
            inside = [i for i, f in enumerate(frames) if first[place] <= f <= last[place]]
            want = min(inside, key=lambda i: abs(seconds[i] - time[place]), default=-1)
            assert got[place] == want


def test_thumbnails_survive_as_tensors() -> None:
    pictures = Thumbnails(width=16)
    none = np.zeros(0, dtype=np.int64)
    empty = Thumbnails()
    empty.restore(pictures.tensors())
    assert len(empty) == 0
    images = [np.full((20, 40, 3), 60 * i, np.uint8) for i in range(3)]
    spans = np.array([0, 2]), np.array([1, 2]), np.array([1.0, 2.0])
    pictures.update([0, 1, 2], [0.0, 1.0, 2.0], images, *spans)
    again = Thumbnails(width=16)
    again.restore(pictures.tensors())
    assert again.tensors()["frame"].tolist() == [1, 2]
    assert again.of(0, 1) == pictures.of(0, 1) is not None
    assert again.of(3, 9) is None
    assert Image.open(io.BytesIO(again.of(2, 2) or b"")).size == (16, 8)
    again.update([], [], [], none, none, none.astype(float))
    assert len(again) == 0


def test_entries_that_are_all_alike_score_nothing() -> None:
    stream = _watch(_stream(entries=6), frames_of([GREY] * 6))
    assert [a.score for a in stream.ask("red", 3)] == pytest.approx([0.0] * 3, abs=1e-6)
