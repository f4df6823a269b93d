"""A memory under every way of generating, and beside pictures, sound and further videos in a prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import transformers

import vmemory
from tests.attaching import FAMILIES, FITS, GREEDY, SMALL, remembers, with_a_small_memory
from tests.tiny_vlms import AUDIO, AUDIO_END, AUDIO_START, IMAGE, VISION_END, VISION_START, padded, tiny, with_types


@pytest.fixture(params=FAMILIES)
def small(request: Any) -> Any:
    return with_a_small_memory(request.param)


def test_every_way_of_generating(small):
    model, inputs, _, answer = small
    L = inputs["input_ids"].shape[1]
    with vmemory.attach(model, config=SMALL):
        fixed = model.generate(**inputs, **GREEDY, cache_implementation="static", disable_compile=True)
        assert torch.equal(fixed, answer)
        assert torch.equal(model.generate(**inputs, **GREEDY, prefill_chunk_size=16), answer)
        assert torch.equal(model.generate(inputs.pop("input_ids"), **inputs, **GREEDY), answer)
    inputs["input_ids"] = answer[:, :L]
    with vmemory.attach(model, config=SMALL):
        torch.manual_seed(0)
        several = model.generate(
            **inputs, max_new_tokens=4, do_sample=True, num_return_sequences=3, pad_token_id=0, eos_token_id=None
        )
        assert several.shape == (3, L + 4)
        assert torch.equal(several[:, :L], inputs["input_ids"].expand(3, -1))
        assert len({tuple(row) for row in several.tolist()}) > 1
        beams = model.generate(
            **inputs, **GREEDY, num_beams=3, num_return_sequences=2, return_dict_in_generate=True, output_scores=True
        )
        assert beams.sequences.shape == (2, L + 4)
        assert torch.equal(beams.sequences[:, :L], inputs["input_ids"].expand(2, -1))
        short = vmemory.compress_inputs(model, inputs)
    # without the memory's hooks, on the prompt that it made
    expected = model.generate(**short, **GREEDY, num_beams=3, num_return_sequences=2)
    assert torch.equal(beams.sequences[:, L:], expected[:, short["input_ids"].shape[1] :])


def test_lengths_count_the_prompt_that_the_caller_gave(small):
    model, inputs, _, answer = small
    L = inputs["input_ids"].shape[1]
    with vmemory.attach(model, config=SMALL):
        out = model.generate(**inputs, max_length=L + 4, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert torch.equal(out, answer)
        stop = int(answer[0, L])
        short = model.generate(**inputs, max_length=L + 4, do_sample=False, pad_token_id=0, eos_token_id=stop)
        assert short.shape == (1, L + 1)
        long = model.generate(
            **inputs, max_length=L + 4, min_length=L + 3, do_sample=False, pad_token_id=0, eos_token_id=stop
        )
        assert L + 3 <= long.shape[1] <= L + 4
        given = transformers.GenerationConfig(max_length=L + 4, do_sample=False, pad_token_id=0)
        assert torch.equal(model.generate(**inputs, generation_config=given), answer)
        assert given.max_length == L + 4
        model.generation_config.max_length = L + 2
        assert model.generate(**inputs, do_sample=False, pad_token_id=0, eos_token_id=None).shape == (1, L + 2)
        assert torch.equal(model.generate(**inputs, generation_config=given), answer)
        assert model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (1, L + 3)


def test_arguments_by_position(small):
    model, inputs, logits, _ = small
    names = ("input_ids", "attention_mask")
    rest = {k: v for k, v in inputs.items() if k not in names}
    with vmemory.attach(model, config=SMALL), torch.no_grad():
        assert torch.equal(model(*(inputs[name] for name in names), **rest).logits, logits)
        with vmemory.attached(model).disabled():
            assert model(*(inputs[name] for name in names), **rest).logits.shape[1] == inputs["input_ids"].shape[1]
    assert model(inputs["input_ids"][:, :3]).logits.shape[1] == 3


def with_picture(family: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """A picture of four tokens in front of the video."""
    draw = torch.Generator().manual_seed(9)
    marks = [torch.tensor([50, VISION_START]), torch.full((4,), IMAGE), torch.tensor([VISION_END])]
    ids = torch.cat([torch.cat(marks)[None], inputs["input_ids"]], 1)
    inputs = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    channels = inputs["pixel_values_videos"].shape[1]
    inputs |= {"pixel_values": torch.randn(16, channels, generator=draw), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return with_types(inputs) if family == "qwen2_5_vl" else inputs | {"image_merge_sizes": torch.tensor([2])}


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_beside_a_video(family):
    model, inputs = tiny(family, T=12)
    inputs = with_picture(family, inputs)
    with torch.no_grad():
        plain, answer = model(**inputs).logits, model.generate(**inputs, **GREEDY)
        with vmemory.attach(model, config=FITS):
            assert remembers(model, inputs, plain, answer)
        with vmemory.attach(model, config=SMALL):
            new = vmemory.compress_inputs(model, inputs)
            assert int((new["input_ids"] == IMAGE).sum()) == 4
            assert new["input_ids"].shape[1] < plain.shape[1]
            short = model(**inputs).logits
            # causal: what stands before the video has not noticed
            torch.testing.assert_close(short[:, :7], plain[:, :7])
            assert torch.equal(model.generate(**inputs, **GREEDY)[:, : plain.shape[1]], inputs["input_ids"])


def of_videos(family: str, inputs: dict[str, Any], rows: list[list[int]], left: bool) -> dict[str, Any]:
    """Prompts whose rows hold those of the two videos in `inputs`."""
    texts = [x[m.bool()] for x, m in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    which = [video for row in rows for video in row]
    patches = inputs["video_grid_thw"].prod(-1).tolist()
    pixels = inputs["pixel_values_videos"].split(patches)
    new = padded([torch.cat([texts[video] for video in row]) for row in rows], left) | {
        "pixel_values_videos": torch.cat([pixels[v] for v in which]), "video_grid_thw": inputs["video_grid_thw"][which],
    }  # fmt: skip
    if family == "qwen2_5_vl":
        return with_types(new) | {"second_per_grid_ts": torch.ones(len(which))}
    changed = inputs["video_compression_mask"].split([n // 4 for n in patches])
    return new | {
        "video_compression_mask": torch.cat([changed[v] for v in which]),
        "video_merge_sizes": inputs["video_merge_sizes"][which],
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("left", [True, False])
def test_two_videos_a_row_in_an_uneven_batch(family, left):
    model, inputs = tiny(family, T=8, B=2)
    both, alone = (of_videos(family, inputs, rows, left) for rows in ([[0, 1], [1]], [[1]]))
    with torch.no_grad():
        plain = model(**both).logits
        with vmemory.attach(model, config=FITS):
            assert torch.equal(model(**both).logits, plain)
        with vmemory.attach(model, config=SMALL) as handle:
            short = model(**both).logits
            assert [k.grid[0] for k in handle.last_prompt] == [8, 11, 11]
            assert torch.equal(handle.last_prompt[1].source, handle.last_prompt[2].source)
            new = vmemory.compress_inputs(model, both, generating=False)
            assert new["input_ids"].shape[1] < short.shape[1] == plain.shape[1]
            # a row does not notice what else is in the batch
            torch.testing.assert_close(short[1][both["attention_mask"][1].bool()], model(**alone).logits[0])
            if left:
                answer = model.generate(**both, **GREEDY)
                assert torch.equal(answer[:, :-4], both["input_ids"])
                assert torch.equal(answer[1, -4:], model.generate(**alone, **GREEDY)[0, -4:])


def test_sound_beside_a_video():
    model, inputs = tiny("qwen2_5_omni_thinker", T=12)
    draw = torch.Generator().manual_seed(4)
    sound = torch.cat([torch.tensor([50, AUDIO_START]), torch.full((5,), AUDIO), torch.tensor([AUDIO_END])])
    ids = torch.cat([sound[None], inputs["input_ids"]], 1)
    inputs |= {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "input_features": torch.randn(1, 8, 20, generator=draw),
        "feature_attention_mask": torch.ones(1, 20, dtype=torch.long),
    }  # fmt: skip
    with torch.no_grad():
        plain, answer = model(**inputs).logits, model.generate(**inputs, **GREEDY)
        with vmemory.attach(model, config=FITS):
            assert remembers(model, inputs, plain, answer)
        with vmemory.attach(model, config=SMALL):
            assert vmemory.compress_inputs(model, inputs)["input_ids"].shape[1] < ids.shape[1]
            short = model(**inputs).logits
            torch.testing.assert_close(short[:, : len(sound)], plain[:, : len(sound)])
            assert torch.equal(model.generate(**inputs, **GREEDY)[:, :-4], ids)
