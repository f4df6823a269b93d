"""Session files that no session wrote: refused in one line, and nothing has changed."""

from __future__ import annotations

import copy
import os
import random

import pytest
import torch

pytest.importorskip("transformers")

from tests.hostile import PLAIN, mutated
from tests.test_session import SETTINGS, chunks
from tests.tiny_vlms import tiny
from vmemory.banks import BankFile, BankFileError
from vmemory.session import VideoSession
from vmemory.session.short_stream import ShortStream

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

WHOLE = [-1, -5, 100, 10**6, 2**31, 2**40, 2**62, -(2**63), 2**63 - 1]


def opening(frames: int = 8) -> ShortStream:
    made = ShortStream(frames)
    made.push(torch.randn(3, 2, 2, 8, generator=torch.Generator().manual_seed(0)), torch.arange(3.0).double(), None)
    return made


def pushed_on(made: ShortStream) -> None:
    """Past its end: what the memory lists is followed in each push."""
    for t in range(12):
        made.push(torch.zeros(1, 2, 2, 8), torch.tensor([100.0 + t]).double(), None)
        if made.bank is not None:
            made.bank.read()


@pytest.mark.parametrize("name", ["order", "counter", "entry"])
def test_no_value_of_an_opening_s_state_is_followed_unseen(name: str) -> None:
    extra, notes = opening().saved()
    pushed_on(ShortStream.resumed(extra, notes, torch.device("cpu")))
    refused = 0
    for at in range(extra[f"short_stream.{name}"].numel()):
        for value in WHOLE:
            forged = {key: x.clone() for key, x in extra.items()}
            forged[f"short_stream.{name}"].view(-1)[at] = value
            try:
                made = ShortStream.resumed(forged, notes, torch.device("cpu"))
            except ValueError:
                refused += 1
                continue
            pushed_on(made)
    # of eight places three are listed; what the others say is not looked at by anybody
    assert refused >= {"order": 3 * len(WHOLE), "counter": 17, "entry": 130}[name]
    with pytest.raises(ValueError, match="short_stream: expected"):
        # a longer one than the memory it comes with
        ShortStream.resumed(extra, {**notes, "frames": 100}, torch.device("cpu"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, a session's file with an opening and a waiting frame, and another that begins after them."""
    model, inputs = tiny("qwen2_5_vl", T=24)
    session = VideoSession(model, config={**SETTINGS, "max_frames_before_compression": 20})
    session.push(torch.zeros(9, 3, 56, 56, dtype=torch.uint8))
    path = tmp_path_factory.mktemp("sessions") / "a.vmem"
    session.save(path)
    return model, inputs, path


def test_a_session_s_file_with_one_thing_changed_is_refused_or_works(saved, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    model, _, path = saved
    session, rng = VideoSession(model, config=SETTINGS), random.Random(5)
    file, forged_path = BankFile.read(path), tmp_path / "b.vmem"
    assert file.notes["session"]["waiting"]
    refused, worked = [], 0
    for i in range(90):
        forged = copy.deepcopy(file)
        notes, name = forged.notes["session"], rng.choice(list(file.notes["session"]))
        if i % 3 == 0:
            tensor = rng.choice(list(forged.extra))
            forged.extra[tensor], name = mutated(forged.extra[tensor], rng), tensor
        elif i % 3 == 1 or name != "short_stream":
            notes[name] = rng.choice(PLAIN)
        else:
            inner = rng.choice(list(notes["short_stream"]))
            notes["short_stream"][inner] = rng.choice(PLAIN)
        try:
            forged.write(forged_path)
        except ValueError:
            continue
        before = session._pushes, session.memory
        try:
            session.resume(forged_path)
        except BankFileError as error:
            refused.append(str(error))
            assert before == (session._pushes, session.memory), name
            continue
        except Exception as error:
            raise AssertionError(name) from error
        worked += 1
        try:
            session.push(torch.zeros(3, 3, 56, 56, dtype=torch.uint8))
        except ValueError:
            # its clock may be far ahead
            assert name in ("last", "fps", "frames", "frame_size"), name
        assert session.num_tokens > 0
    assert len(refused) > 40
    assert worked > 2
    assert all(words.startswith(f"{forged_path}: ") and "\n" not in words for words in refused)


def test_a_session_of_another_model_is_refused_before_anything_changes(saved) -> None:
    _, _, path = saved
    other, inputs = tiny("video_llama_3", T=8)
    session = VideoSession(other, config=SETTINGS)
    session.push(**next(chunks(inputs, 4)))
    before = session.held
    with pytest.raises(BankFileError, match=r"a\.vmem: "):
        session.resume(path)
    assert torch.equal(session.held.tokens, before.tokens)


def test_a_blank_frame_larger_than_any_is_not_made(saved, tmp_path) -> None:
    model, _, path = saved
    file = BankFile.read(path)
    for size in ([10**6, 10**6], [2**14, 2**14], [0, 56], [57, 3], "56x56"):
        file.notes["session"]["frame_size"] = size
        file.write(tmp_path / "b.vmem")
        with pytest.raises(BankFileError, match=r"frame_size|session: expected tokens"):
            VideoSession.load(tmp_path / "b.vmem", model)
