"""What people do with `generate` beside one question: no gradients, beams of a batch, a helper, a second turn."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
import transformers

import vmemory
from tests.attach_oracle import GREEDY as PLAIN
from tests.attaching import SMALL
from tests.tiny_vlms import FAMILIES, IMAGE, VIDEO, tiny, with_types
from vmemory.banks import RecentBank
from vmemory.models.adapter import _copies_entry_by_entry
from vmemory.models.compress_video import placed
from vmemory.models.turn import cache_argument, cache_in

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

# cached and uncached attention add up in another order, in float32
CACHED = 1e-5
# words that are neither marks nor places
GREEDY = {**PLAIN, "suppress_tokens": list(range(185, 200))}


def followed(inputs, sequences, new):
    """The inputs of a conversation that goes on with `new` tokens."""
    ids = torch.cat([sequences, torch.tensor([new] * len(sequences))], 1)
    more = ids.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), more, dtype=torch.long)], 1)
    whole = {**inputs, "input_ids": ids, "attention_mask": mask}
    return with_types(whole) if "mm_token_type_ids" in inputs else whole


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [None, 3])
def test_no_gradients(family, chunk):
    model, inputs = tiny(family, T=7)
    seen = []
    tower = next(m for name, m in model.named_modules() if name.endswith(("visual", "vision_tower", "vision_model")))
    tower.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    with vmemory.attach(model, config={**SMALL, "memory_chunk_frames": chunk}):
        model.generate(**inputs, **GREEDY)
        assert seen
        assert not any(seen)
        model(**inputs)
        assert seen[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_beam_and_each_answer_sees_its_own_video(family):
    model, inputs = tiny(family, T=6, B=2)
    one = {**GREEDY, "max_new_tokens": 1}
    with vmemory.attach(model, config=SMALL):
        alone = model.generate(**inputs, **one).logits[0].repeat_interleave(2, 0)
        beams = model.generate(**inputs, **one, num_beams=2).logits[0]
        several = model.generate(**inputs, **{**one, "do_sample": True}, num_return_sequences=2).logits[0]
    assert not torch.allclose(alone[0], alone[2], rtol=0, atol=1e-4)
    for logits in (beams, several):
        torch.testing.assert_close(logits, alone, rtol=0, atol=CACHED)


@pytest.mark.parametrize("family", ["llava_onevision", "vipllava"])
def test_beams_of_videos_of_which_unlike_numbers_of_tokens_stay(family):
    model, inputs = tiny(family, T=6, B=2)
    lengths = iter([2, 3] * 3)
    kept = SimpleNamespace(
        compress=lambda clip, time, mask=None: RecentBank(clip.shape[-1], clip.shape[1:3], next(lengths)).compress(clip)
    )
    one = {**GREEDY, "max_new_tokens": 1}
    with vmemory.attach(model, kept):
        alone = model.generate(**inputs, **one).logits[0].repeat_interleave(2, 0)
        pooled = vmemory.compress_inputs(model, inputs)["mm_encoder_outputs"].popitem()[1].pooler_output
        assert pooled.shape[1] == 1
        if _copies_entry_by_entry(model, "image" if family == "vipllava" else "video"):
            with pytest.raises(ValueError, match="num_beams, num_return_sequences: expected one video"):
                model.generate(**inputs, **one, num_beams=2)
        else:
            beams = model.generate(**inputs, **one, num_beams=2).logits[0]
            torch.testing.assert_close(beams, alone, rtol=0, atol=CACHED)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "video_llama_3", "llava_onevision", "qwen3_vl"])
def test_a_helper_guesses_and_the_answer_stays(family):
    model, inputs = tiny(family)
    helper, _ = tiny(family, seed=1)
    with vmemory.attach(model, config=SMALL):
        greedy = model.generate(**inputs, **GREEDY).sequences
        assert torch.equal(model.generate(**inputs, **GREEDY, assistant_model=helper).sequences, greedy)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_and_a_third_turn_on_the_cache_equal_the_conversation_sent_again(family):
    model, inputs = tiny(family, T=6, B=2)
    name, fed = cache_argument(model), []
    model.register_forward_pre_hook(lambda m, a, k: fed.append(k["input_ids"].shape[1]), with_kwargs=True)
    with vmemory.attach(model, config=SMALL):
        out = model.generate(**inputs, **GREEDY)
        for more in ([20, 21, 22], [30]):
            whole = followed(inputs, out.sequences, more)
            again = model.generate(**whole, **GREEDY)
            asked = {k: whole[k] for k in ("input_ids", "attention_mask")}
            fed.clear()
            out = model.generate(**asked, **{name: cache_in(out)[1]}, **GREEDY)
            # the answer's last token and the new ones
            assert fed[0] == 1 + len(more)
            assert torch.equal(out.sequences, again.sequences)
            for a, b in zip(out.logits, again.logits, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=CACHED)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "video_llama_3", "llava_onevision"])
def test_turns_on_a_cache_of_one_s_own_with_the_videos_given_again(family):
    model, inputs = tiny(family, T=6)
    name, kind = cache_argument(model), {k: v for k, v in GREEDY.items() if k[:6] != "return" and k[:6] != "output"}
    with vmemory.attach(model, config=SMALL) as handle:
        cache = transformers.DynamicCache(config=model.config.get_text_config())
        first = model.generate(**inputs, **{name: cache}, **kind)
        whole = followed(inputs, first, [20, 21])
        wanted = model.generate(**whole, **kind)
        twin = copy.deepcopy(cache)
        # somebody else's prompt comes between
        model.generate(**tiny(family, T=9)[1], **kind)
        assert torch.equal(model.generate(**whole, **{name: twin}, **kind), wanted)
        with handle.disabled():
            assert torch.equal(model.generate(**whole, **{name: copy.deepcopy(cache)}, **kind), wanted)
        text = torch.tensor([[5, 6, 7]])
        plain = model.generate(text, **kind)
        cache.reset()
        assert torch.equal(model.generate(text, **{name: cache}, **kind), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loop_of_one_s_own(family):
    model, inputs = tiny(family, T=6, B=2)
    name = cache_argument(model)
    with vmemory.attach(model, config=SMALL), torch.no_grad():
        whole = followed(inputs, inputs["input_ids"], [20, 21])
        wanted = model(**whole).logits[:, -2:]
        out = model(**inputs, use_cache=True)
        torch.testing.assert_close(out.logits, model(**whole).logits[:, :-2], rtol=0, atol=CACHED)
        more = {"input_ids": whole["input_ids"][:, -2:], "attention_mask": whole["attention_mask"]}
        cached = model(**more, **{name: cache_in(out)[1]}, use_cache=True).logits
    torch.testing.assert_close(cached, wanted, rtol=0, atol=CACHED)


def test_what_a_turn_cannot_be():
    model, inputs = tiny("qwen2_5_vl", T=6)
    name = cache_argument(model)
    with vmemory.attach(model, config=SMALL):
        out = model.generate(**inputs, **GREEDY)
        cache = cache_in(out)[1]
        whole = followed(inputs, out.sequences, [20, VIDEO, 21])
        for token in (VIDEO, IMAGE):
            whole["input_ids"][0, -2] = token
            with pytest.raises(ValueError, match=f"{name}: expected an empty cache with a new video"):
                model.generate(**whole, **{name: cache}, **GREEDY)
        whole = followed(inputs, out.sequences, [20])
        whole["input_ids"][0, 1] += 1
        with pytest.raises(ValueError, match=r"input_ids: expected the .* whose videos the cache holds"):
            model.generate(**whole, **{name: cache}, **GREEDY)
        with pytest.raises(ValueError, match=r"input_ids: expected the .* whose videos the cache holds"):
            model.generate(torch.tensor([[20, 21]]), **{name: cache}, **GREEDY)
        length = cache.get_seq_length()
        cache.crop(10 - length)
        with pytest.raises(ValueError, match=rf"{name}: expected all .* cut to 10"):
            model.generate(**followed(inputs, out.sequences, [20]), **{name: cache}, **GREEDY)


def test_pooled_and_merged_tokens_take_cells_that_exist():
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        T, H, W = 3, 2, 4
        mask = torch.rand(T, H, W, generator=draw) < 0.5
        cells = mask.flatten().nonzero().flatten()
        # what was chosen among cells that exist stays where it is
        some = cells[torch.rand(len(cells), generator=draw) < 0.5]
        assert torch.equal(placed(some, mask), some)
        count = int(torch.randint(0, len(cells) + 1, (), generator=draw))
        source = torch.randperm(T * H * W, generator=draw)[:count].sort().values
        took = placed(source, mask)
        assert torch.isin(took, cells).all()
        assert bool((took.diff() > 0).all())
        fits = torch.bincount(source // 8, minlength=T) <= mask.sum((1, 2))
        if bool(fits.all()):
            assert torch.equal(took // 8, source // 8)
    with pytest.raises(ValueError, match="memory: expected at most 1 tokens"):
        placed(torch.tensor([0, 1]), torch.tensor([[[True, False]]]))
