"""The examples run as they stand, on their tiny models, and do what they say."""

from __future__ import annotations

import runpy
import sys
from importlib import import_module
from pathlib import Path

import pytest

from vmemory import banks

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def example(monkeypatch):
    """An example's `main`, its imports as if it were run as a script."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["example"])
    yield lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="example")["main"]
    sys.modules.pop("shared", None)


def test_attach_and_generate(example, capsys):
    held = example("attach_and_generate")([])
    # pairs of frames of 4 × 4 tokens: 2 as they come, 4 at half the side, 6 and then 8 of one token
    assert held == {24: 2 * 16 + 4 * 4 + 6, 48: 2 * 16 + 4 * 4 + 8}
    assert "384 visual tokens became 56" in capsys.readouterr().out


def test_live_session(example, capsys):
    seen = example("live_session")([])
    assert [calls for calls, _, _ in seen] == [8, 16, 24]
    assert len({(tokens, nbytes) for _, tokens, nbytes in seen}) == 1
    assert "answers alike: True" in capsys.readouterr().out


def test_a_checkpoint_takes_the_place_of_the_tiny_model(example, tmp_path, capsys, monkeypatch):
    # the folder has a tokenizer and no processor
    monkeypatch.setattr("vmemory.models.loading.find_spec", lambda name: None)
    main = example("live_session")
    model, processor = main.__globals__["load"](None)
    model.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    seen = main(["--model", str(tmp_path)])
    assert [calls for calls, _, _ in seen] == [8, 16, 24]
    assert "answers alike: True" in capsys.readouterr().out


def test_lora_on_attached(example):
    pytest.importorskip("peft")
    losses = example("lora_on_attached")([])
    assert set(losses) == {"merging", "dual"}
    assert all(loss[-1] < loss[0] for loss in losses.values())


def test_custom_policy(example):
    # of 24 frames, in scenes of 8: one of the first two, and the newest always
    assert example("custom_policy")([]) == [15, 16, 23]
    banks.POLICIES.pop("outliers")


def test_custom_family(example, monkeypatch):
    from vmemory.models import registry

    # all that is known before the example adds to it
    import_module("vmemory._attach")._load_families()
    monkeypatch.setattr(registry, "_BY_TYPE", dict(registry._BY_TYPE))
    same, before, after = example("custom_family")([])
    assert same
    assert (before, after) == (16 * 16, 2 * 16 + 2 * 4 + 2)


def test_each_is_short_and_each_is_tested():
    scripts = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    scripts.pop("shared")
    assert max(scripts.values()) < 60
    assert {f"test_{name}" for name in scripts} <= set(globals())


def test_a_video_file_goes_in(example, tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(20):
            picture = av.VideoFrame(64, 48, "rgb24").to_ndarray()
            picture[:] = 12 * i
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        out.mux(stream.encode())
    assert example("attach_and_generate")(["--video", str(path)]) == {10: 2 * 16 + 3 * 4, 20: 2 * 16 + 4 * 4 + 4}
