"""Many sessions over one model within a number of bytes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from tests.attach_oracle import GREEDY
from tests.test_session import SETTINGS, chunks, question
from tests.tiny_vlms import tiny
from vmemory.stream import SessionPool, VideoSession

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


def test_sessions_that_waited_on_disk_go_on_as_if_they_had_not(tmp_path):
    model, inputs = tiny("qwen2_5_vl", T=24)
    pieces, (asked, _) = list(chunks(inputs, 4)), question("qwen2_5_vl", inputs)
    alone = VideoSession(model, config=SETTINGS)
    for piece in pieces:
        alone.push(**piece)
    wanted = alone.ask(input_ids=asked, **GREEDY)

    def open_session():
        return VideoSession(model, config=SETTINGS)

    size = int(alone.memory.nbytes)
    pool = SessionPool(open_session, 2 * size, tmp_path)
    names = ["a", "b/c", "d", "e"]
    for piece in pieces:
        for name in names:
            pool[name].push(**piece)
            # the one asked for comes on top, until the next is
            assert pool.nbytes <= 3 * size
    assert set(pool) < set(names)
    for name in names:
        out = pool[name].ask(input_ids=asked, **GREEDY)
        assert torch.equal(out.sequences, wanted.sequences)
        assert all(torch.equal(a, b) for a, b in zip(out.logits, wanted.logits, strict=True))
    pool.close()
    later = SessionPool(open_session, 2 * size, tmp_path)
    assert all(name in later for name in names)
    assert torch.equal(later["d"].ask(input_ids=asked, **GREEDY).sequences, wanted.sequences)
    later.drop("d")
    assert "d" not in later


def test_ten_thousand_frames_leave_no_bytes_behind():
    from resource import RUSAGE_SELF, getrusage

    model, inputs = tiny("qwen2_5_vl", T=50)
    session = VideoSession(model, config=SETTINGS)
    piece, resident = next(chunks(inputs, 50)), []
    piece["video_grid_thw"] = inputs["video_grid_thw"]
    piece["pixel_values_videos"] = inputs["pixel_values_videos"]
    held = set()
    for _ in range(200):
        session.push(**piece)
        held.add((session.nbytes, session.num_tokens))
        resident.append(getrusage(RUSAGE_SELF).ru_maxrss)
    assert session.memory.counts()["seen"] == 10_000
    assert len(held) == 1
    # kilobytes; the first pushes warm torch's allocator up
    assert resident[-1] - resident[20] < 4096
