"""Several questions at once, and several memories over one stream: the same answers as one by one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from tests.test_session_words import film
from tests.tiny_vlms import FAMILIES, tiny
from tests.tiny_words import byte_words
from vmemory.session import SessionGroup, VideoSession

SMALL = {"memory_capacities": [3, 2, 1]}
TEXTS = ["what happens?", "a", "and where is the longest of all the questions?", "what happens?"]
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def words():
    return byte_words()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reuse", [True, False])
def test_questions_together_have_the_answers_of_questions_one_by_one(words, family, reuse):
    model, _ = tiny(family)
    model.generation_config.pad_token_id = 0
    session = VideoSession(model, words, config=SMALL, reuse_prefix=reuse)
    # the last frame waits for its pair in some families
    session.push(film(11))
    alone = [session.ask(text, max_new_tokens=5, do_sample=False) for text in TEXTS]
    assert session.ask_all(TEXTS, 5) == alone
    assert session.ask_all(TEXTS[2:3], 5) == alone[2:3]
    session.push(film(13)[11:])
    assert session.ask_all(TEXTS, 5) == [session.ask(text, max_new_tokens=5, do_sample=False) for text in TEXTS]


def test_an_answer_ends_at_its_own_end(words):
    model, _ = tiny("qwen2_5_vl")
    session = VideoSession(model, words, config=SMALL)
    session.push(film(8))
    prompt = session.prompt(TEXTS[0])
    length = prompt["input_ids"].shape[1]
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    whole = session.ask_all(TEXTS, 6)
    first = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0, length:].tolist()
    # the third token of the first answer now ends every answer that has it
    model.generation_config.eos_token_id = [first[2]]
    got = session.ask_all(TEXTS, 6)
    assert got == [session.ask(text, max_new_tokens=6, do_sample=False) for text in TEXTS]
    assert whole[0].startswith(got[0])
    assert got[0] == words.decode(first[: first.index(first[2])], skip_special_tokens=True)


def test_no_question_and_bad_questions(words):
    model, _ = tiny("llava_onevision")
    session = VideoSession(model, words, config=SMALL)
    assert session.ask_all([]) == []
    with pytest.raises(ValueError, match="session: expected frames"):
        session.ask_all(["what?"])
    session.push(film(4))
    with pytest.raises(ValueError, match="text: expected a question"):
        session.ask_all(["what?", " "])
    with pytest.raises(ValueError, match="max_new_tokens: expected"):
        session.ask_all(["what?"], 0)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "video_llama_3"])
def test_a_group_encodes_once_what_its_sessions_would_encode_each(words, family):
    model, _ = tiny(family)
    memories = {
        "recent": {"memory_policy": "recent", "memory_capacities": (3,)},
        "merging": {"memory_policy": "merging", "memory_capacities": (2,)},
        "default": None,
    }
    group = SessionGroup(model, words, memories)
    alone = {name: VideoSession(model, words, config=config) for name, config in memories.items()}
    for part in (slice(0, 5), slice(5, 6), slice(6, 13)):
        group.push(film(13)[part])
        for session in alone.values():
            session.push(film(13)[part])
    for name, session in alone.items():
        ours, theirs = group.sessions[name].prompt("what?"), session.prompt("what?")
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
        assert torch.equal(group.sessions[name].held.tokens, session.held.tokens)
        assert group.sessions[name].ask_all(TEXTS, 3) == session.ask_all(TEXTS, 3)
    assert group.tower.calls == session.tower.calls
    assert len(list(group)) == 3
    with pytest.raises(ValueError, match="memories: expected at least one"):
        SessionGroup(model, words, {})
