"""The plug-in for lmms-eval, against a stub of its interface."""

from __future__ import annotations

import importlib
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from vmemory.data.world import World, write_video
from vmemory.eval.cells import cells_of
from vmemory.session import VideoSession
from vmemory.sources import FrameSource

pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


class Lmms:
    """The part of `lmms_eval.api.model.lmms` that models use."""

    def __init__(self):
        self.task_dict = {}
        self.cached = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *entry: self.cached.append(entry))


@pytest.fixture
def plugin(monkeypatch):
    """The class, found in the way in which lmms-eval finds it."""
    registered = {}

    def register_model(name):
        return lambda cls: registered.setdefault(name, cls)

    for name, content in (
        ("lmms_eval", {}), ("lmms_eval.api", {}), ("lmms_eval.api.model", {"lmms": Lmms}),
        ("lmms_eval.api.registry", {"register_model": register_model}),
    ):  # fmt: skip
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "vmemory.eval.lmms.models.vmemory_session", raising=False)
    plug_in = "vmemory.eval.lmms"
    [(name, cls)] = importlib.import_module(f"{plug_in}.models").AVAILABLE_MODELS.items()
    found = getattr(importlib.import_module(f"{plug_in}.models.{name}"), cls)
    assert registered == {name: found}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from vmemory.train.worldlm import world_model, world_tokenizer

    path = tmp_path_factory.mktemp("model")
    world_model().save_pretrained(path)
    world_tokenizer().save_pretrained(path)
    write_video(path / "a.mp4", World(1, 12))
    write_video(path / "b.mp4", World(2, 12))
    return path


def request(model, text, second, number, visuals):
    model.task_dict = {"task": {"test": {0: "a", 1: "b"}}}
    return SimpleNamespace(args=(text, second, visuals, number, "task", "test"))


def test_answers_are_those_of_a_session(plugin, folder, monkeypatch):
    model = plugin(str(folder), memory="recent", budget="16", frame_tokens=4, batch_size=1, device="cpu")
    watched = []
    watch = plugin.watch
    monkeypatch.setattr(plugin, "watch", lambda self, visuals: (watched.append(visuals), watch(self, visuals))[1])

    def film(doc):
        return [str(folder / f"{doc}.mp4")]

    asked = [
        request(model, "<video>\nWhere are we now?", {"max_new_tokens": 3}, 0, film),
        request(model, "What is red now?", {"max_new_tokens": 5, "temperature": 0}, 0, film),
        request(model, "Where are we now?", {"max_new_tokens": 3, "until": ["\n"]}, 1, film),
    ]
    answers = model.generate_until(asked)
    assert len(watched) == 2
    for answer, one, name in zip(answers, asked, "aab", strict=True):
        made = cells_of(["recent"], ["16"])[1]
        session = VideoSession(
            model.model, model.processor, lambda made=made, **like: made.memory(20, **like), frame_tokens=4
        )
        session.push(FrameSource(folder / f"{name}.mp4", 1.0))
        text = one.args[0].replace("<video>\n", "")
        assert answer == session.ask(text, max_new_tokens=one.args[1]["max_new_tokens"], do_sample=False).split("\n")[0]
    assert [entry[2] for entry in model.cached] == [answers[0], answers[1], answers[2]]


def test_likelihoods_are_of_the_answer_that_would_be_written(plugin, folder):
    model = plugin(str(folder), memory="merging", budget="50%", frame_tokens=4, device="cpu")
    pictures = [frame.image for frame in FrameSource(folder / "a.mp4", 1.0)]
    from PIL import Image

    def visuals(doc):
        return [Image.fromarray(picture) for picture in pictures]

    [written] = model.generate_until([request(model, "Where are we now?", {"max_new_tokens": 2}, 0, visuals)])
    asked = [request(model, "Where are we now?", target, 0, visuals) for target in (written, lambda doc: "yes no")]
    (likely, greedy), (other, not_greedy) = model.loglikelihood(asked)
    assert greedy
    assert not not_greedy
    assert other < likely < 0
    # against one forward pass written out
    session = model.watch(visuals("a"))
    ids = session.prompt("Where are we now?")
    target = model.processor.tokenizer("yes no", add_special_tokens=False)["input_ids"]
    total = 0.0
    for token in target:
        scores = model.model(**ids).logits[0, -1].float().log_softmax(-1)
        total += float(scores[token])
        ids["input_ids"] = torch.cat([ids["input_ids"], torch.tensor([[token]])], 1)
        ids["attention_mask"] = torch.ones_like(ids["input_ids"])
    assert math.isclose(total, other, rel_tol=1e-4)


def test_stop_words_end_an_answer(plugin):
    from vmemory.eval.lmms.models.vmemory_session import _settings, _until

    assert _until("a\n\nb", ("\n\n",)) == "a"
    assert _settings({"until": "x"}) == (128, ("x",))


def test_bad_input_is_named(plugin, folder):
    with pytest.raises(ValueError, match="batch_size: expected 1, got 4"):
        plugin(str(folder), batch_size=4)
    with pytest.raises(ValueError, match="model_args: expected arguments of SessionModel, got modality"):
        plugin(str(folder), modality="video")
    with pytest.raises(ValueError, match="got 'bogus'"):
        plugin(str(folder), memory="bogus")
    model = plugin(str(folder), frame_tokens=4, device="cpu")
    for visuals in ([], ["a.mp4", "b.mp4"]):
        with pytest.raises(ValueError, match="visuals: expected one film or pictures"):
            model.generate_until([request(model, "What?", {}, 0, lambda doc, v=visuals: v)])
    for how in ({"do_sample": True}, {"temperature": 0.5}, {"num_beams": 2}):
        with pytest.raises(ValueError, match="gen_kwargs: expected greedy answers"):
            model.generate_until([request(model, "What?", how, 0, lambda doc: [str(folder / "a.mp4")])])
    with pytest.raises(NotImplementedError, match="several rounds"):
        model.generate_until_multi_round([])
