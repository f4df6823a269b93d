"""A memory in a model beside what else people put on models: PEFT, accelerate, FSDP2, pickles, caches."""

from __future__ import annotations

import copy
import inspect
import io
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from torch import nn

import vmemory
from tests.tiny_vlms import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    IMAGE,
    VISION_END,
    VISION_START,
    padded,
    tiny,
    with_types,
)
from vmemory.banks import DualMemory

FAMILIES = ["qwen2_5_vl", "video_llama_3"]
SMALL = {"memory_capacities": (3, 2, 1)}
FITS = {"memory_policy": "recent", "memory_capacities": (100,)}
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(params=FAMILIES)
def small(request: Any) -> Iterator[tuple[Any, dict[str, Any], torch.Tensor, torch.Tensor]]:
    """A model without a memory, inputs, and what it gives with one: logits and an answer."""
    model, inputs = tiny(request.param, T=12)
    with vmemory.attach(model, config=SMALL), torch.no_grad():
        logits, answer = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    return model, inputs, logits, answer


@torch.no_grad()
def remembers(model: Any, inputs: dict[str, Any], logits: torch.Tensor, answer: torch.Tensor) -> bool:
    same = torch.equal(model(**inputs).logits, logits)
    return same and torch.equal(model.generate(**inputs, **GREEDY), answer)


def lora(task: str | None = None) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=task)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("first", ["memory", "lora"])
def test_lora_trains_over_and_under_a_memory(small, first, task):
    model, inputs, logits, answer = small
    peft = pytest.importorskip("peft")
    plain = model(**inputs).logits
    if first == "memory":
        handle = vmemory.attach(model, config=SMALL)
        outer = peft.get_peft_model(model, lora(task)).eval()
    else:
        outer = peft.get_peft_model(model, lora(task)).eval()
        handle = vmemory.attach(outer, config=SMALL)
    assert vmemory.attached(outer) is handle
    # a fresh LoRA is the identity
    assert remembers(outer, inputs, logits, answer)
    outer.train()
    learner = torch.optim.SGD([w for w in outer.parameters() if w.requires_grad], 0.5)
    losses = []
    for _ in range(3):
        learner.zero_grad()
        out = outer(**inputs, labels=inputs["input_ids"])
        out.loss.backward()
        losses.append(float(out.loss.detach()))
        learner.step()
    moved = [w for name, w in outer.named_parameters() if "lora_" in name and w.grad.abs().sum() > 0]
    assert len(moved) == len([name for name, _ in outer.named_parameters() if "lora_" in name])
    assert losses[-1] < losses[0]
    handle.detach()
    outer.eval()
    with outer.disable_adapter():
        assert torch.equal(outer(**inputs).logits, plain)
    again = outer.merge_and_unload()
    with vmemory.attach(again, config=SMALL):
        assert again(**inputs).logits.shape == logits.shape


def test_a_learned_memory_trains_beside_lora():
    model, inputs = tiny("qwen2_5_vl", T=6)
    peft = pytest.importorskip("peft")
    outer = peft.get_peft_model(model, lora()).train()
    with vmemory.attach(outer, DualMemory(32, (4, 4), (2, 3), heads=2)):
        outer(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert model.vmemory.alpha.grad.abs() > 0


def test_lora_can_save_and_train_the_memory_with_it():
    model, inputs = tiny("qwen2_5_vl", T=6)
    plain = model(**inputs).logits
    peft = pytest.importorskip("peft")
    handle = vmemory.attach(model, "dual")
    settings = peft.LoraConfig(r=2, target_modules=["self_attn.q_proj"], modules_to_save=["vmemory"])
    outer = peft.get_peft_model(model, settings).train()
    outer(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = {name: w for name, w in outer.named_parameters() if "modules_to_save" in name}
    alpha = next(w for name, w in trained.items() if name.endswith("alpha"))
    assert alpha.grad.abs() > 0
    with torch.no_grad():
        alpha.fill_(1.0)
    outer.eval()
    assert not torch.equal(outer(**inputs).logits, plain)
    with outer.disable_adapter():
        assert torch.equal(outer(**inputs).logits, plain)
    handle.detach()
    assert torch.equal(outer(**inputs).logits, plain)


@pytest.mark.parametrize("first", ["memory", "hook"])
def test_accelerate_hooks_before_and_after(small, first):
    model, inputs, logits, answer = small
    hooks = pytest.importorskip("accelerate.hooks")
    plain = model(**inputs).logits
    if first == "memory":
        handle = vmemory.attach(model, config=SMALL)
    hooks.add_hook_to_module(model, hooks.AlignDevicesHook(io_same_device=True, execution_device="cpu"))
    if first == "hook":
        handle = vmemory.attach(model, config=SMALL)
    assert remembers(model, inputs, logits, answer)
    handle.detach()
    assert torch.equal(model(**inputs).logits, plain)
    hooks.remove_hook_from_module(model)
    with vmemory.attach(model, config=SMALL):
        assert remembers(model, inputs, logits, answer)


@pytest.mark.parametrize("memory", [None, "dual"])
def test_weights_offloaded_by_accelerate(small, memory):
    model, inputs, logits, answer = small
    accelerate = pytest.importorskip("accelerate")
    if memory == "dual":
        logits, answer = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    model = accelerate.cpu_offload(model)
    with vmemory.attach(model, memory, SMALL if memory is None else None):
        assert remembers(model, inputs, logits, answer)


@pytest.mark.parametrize("first", ["memory", "forward"])
def test_a_forward_of_the_instance(small, first):
    model, inputs, logits, _ = small
    seen = []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(sorted(kwargs))
        return type(self).forward(self, *args, **kwargs)

    if first == "memory":
        vmemory.attach(model, config=SMALL)
    model.forward = types.MethodType(forward, model)
    if first == "forward":
        vmemory.attach(model, config=SMALL)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
    assert "mm_encoder_outputs" in seen[0]
    assert "pixel_values_videos" not in seen[0]
    vmemory.attached(model).detach()
    assert model.__dict__["forward"].__func__ is forward


@pytest.fixture
def mesh() -> Iterator[Any]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("first", ["memory", "sharding"])
@pytest.mark.parametrize("memory", [None, "dual"])
def test_fully_sharded(small, mesh, first, memory):
    from torch.distributed.fsdp import fully_shard

    model, inputs, logits, _ = small
    plain = model(**inputs).logits.detach()
    if first == "memory":
        handle = vmemory.attach(model, memory, SMALL if memory is None else None)
    blocks = [*model.model.language_model.layers]
    tower = getattr(model.model, "visual", None) or model.model.vision_model
    for part in (*blocks, tower, model):
        fully_shard(part, mesh=mesh)
    if first == "sharding":
        handle = vmemory.attach(model, memory, SMALL if memory is None else None)
    out = model(**inputs, labels=inputs["input_ids"])
    torch.testing.assert_close(out.logits, plain if memory else logits)
    out.loss.backward()
    assert all(w.grad is not None for w in tower.parameters())
    if memory:
        alpha = model.vmemory.alpha.grad
        assert abs(float(alpha.full_tensor() if hasattr(alpha, "full_tensor") else alpha)) > 0
    handle.detach()
    torch.testing.assert_close(model(**inputs).logits, plain)


@pytest.mark.parametrize("memory", [None, "dual"])
def test_a_copy_has_its_own_handle(small, memory):
    model, inputs, logits, answer = small
    plain = model(**inputs).logits
    handle = vmemory.attach(model, memory, SMALL if memory is None else None)
    if memory is None:
        # what a forward with gradients leaves behind must not stand in the way
        model(**inputs)
    other = copy.deepcopy(model)
    own = vmemory.attached(other)
    assert own is not handle
    assert own.model is other
    if memory:
        assert own.memory is other.vmemory
        assert own.memory is not handle.memory
    own.detach()
    assert not hasattr(other, "vmemory")
    assert torch.equal(other(**inputs).logits, plain)
    assert vmemory.attached(model) is handle
    if memory is None:
        assert remembers(model, inputs, logits, answer)


def pickled(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_a_pickle_remembers(small):
    model, inputs, logits, answer = small
    plain = model(**inputs).logits
    vmemory.attach(model, config=SMALL)
    model(**inputs)
    other = pickled(model)
    assert remembers(other, inputs, logits, answer)
    assert vmemory.attached(other).model is other
    vmemory.attached(other).detach()
    assert torch.equal(other(**inputs).logits, plain)
    assert remembers(model, inputs, logits, answer)


def test_a_saved_model_remembers_by_its_config_alone(small, tmp_path):
    model, inputs, logits, answer = small
    with vmemory.attach(model, config=SMALL | {"max_frames_before_compression": 2}):
        model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path).eval()
    assert vmemory.attached(other) is None
    assert other(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
    with vmemory.attach(other) as handle:
        assert handle.config.memory_capacities == (3, 2, 1)
        assert handle.config.max_frames_before_compression == 2
        assert remembers(other, inputs, logits, answer)


def test_learned_weights_travel_in_the_state(tmp_path):
    model, inputs = tiny("qwen2_5_vl", T=6)
    vmemory.attach(model, "dual")
    nn.init.constant_(model.vmemory.alpha, 0.5)
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path).eval()
    vmemory.attach(other)
    assert not torch.equal(other(**inputs).logits, logits)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(**inputs).logits, logits)


def test_gradient_checkpointing_changes_no_gradient(small):
    model, inputs, _, _ = small
    model.train()
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        with vmemory.attach(model, config=SMALL):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append([w.grad.clone() for w in model.parameters() if w.grad is not None])
    assert grads[0]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("memory", [None, "dual"])
def test_bfloat16(small, memory):
    model, inputs, _, _ = small
    model = model.bfloat16()
    inputs = {k: v.bfloat16() if v.is_floating_point() and "pixel" in k else v for k, v in inputs.items()}
    plain = model(**inputs).logits
    with vmemory.attach(model, memory, SMALL if memory is None else None) as handle:
        out = model(**inputs)
        assert out.logits.dtype == torch.bfloat16
        assert handle.kept[0].tokens.dtype == torch.bfloat16
        assert model.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 4
        assert torch.equal(out.logits, plain) if memory else out.logits.shape[1] < plain.shape[1]


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
            short = model(**inputs).logits
            assert short.shape[1] == new["input_ids"].shape[1] < plain.shape[1]
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
            assert [k.grid[0] for k in handle.kept] == [8, 11, 11]
            assert torch.equal(handle.kept[1].source, handle.kept[2].source)
            new = vmemory.compress_inputs(model, both, generating=False)
            assert short.shape[1] == new["input_ids"].shape[1] < plain.shape[1]
            # a row does not notice what else is in the batch
            torch.testing.assert_close(short[1][new["attention_mask"][1].bool()], model(**alone).logits[0])
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
            short = model(**inputs).logits
            assert short.shape[1] < plain.shape[1]
            torch.testing.assert_close(short[:, : len(sound)], plain[:, : len(sound)])
            assert torch.equal(model.generate(**inputs, **GREEDY)[:, :-4], ids)


def test_an_unknown_model_is_told_what_was_found_and_what_is_known():
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"expected one of .*clip.*qwen2_5_vl.*video_llama_3.*videollama3_qwen2") as e:
        vmemory.attach(model)
    assert "got Qwen2ForCausalLM of type 'qwen2'" in str(e.value)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        vmemory.attach("qwen2_5_vl")


def test_a_speaking_model_is_sent_to_its_thinker():
    thinker, inputs = tiny("qwen2_5_omni_thinker")
    whole = nn.Module()
    whole.thinker = thinker
    with pytest.raises(ValueError, match=r"expected the part that reads the prompt, model.thinker, got Module"):
        vmemory.attach(whole)
    with vmemory.attach(thinker, config=SMALL):
        with pytest.raises(ValueError, match="output_hidden_states: expected False with a memory, got True"):
            thinker.generate(**inputs, **GREEDY, output_hidden_states=True)
        with pytest.raises(ValueError, match="output_hidden_states: expected False"):
            thinker(**inputs, output_hidden_states=True)


def test_inside_the_wrapper_of_compile(small):
    model, inputs, logits, answer = small
    wrapped = torch.compile(model, backend="eager")
    with vmemory.attach(wrapped, config=SMALL) as handle:
        assert handle.model is model
        assert vmemory.attached(wrapped) is handle
        assert remembers(model, inputs, logits, answer)


def test_signatures_are_the_model_s_own(small):
    model = small[0]
    plain = inspect.signature(model.generate), inspect.signature(model.forward)
    with vmemory.attach(model, config=SMALL):
        assert (inspect.signature(model.generate), inspect.signature(model.forward)) == plain


def test_a_prompt_through_another_memory_than_the_one_attached():
    model, inputs = tiny("qwen2_5_vl", T=12)
    expected = vmemory.compress_inputs(model, inputs, config=SMALL)["input_ids"]
    with vmemory.attach(model, "dual"):
        assert vmemory.compress_inputs(model, inputs)["input_ids"].shape == inputs["input_ids"].shape
        assert torch.equal(vmemory.compress_inputs(model, inputs, config=SMALL)["input_ids"], expected)
        memory = DualMemory(32, (4, 4), (2, 3), heads=2)
        whole = vmemory.compress_inputs(model, inputs, memory)["mm_encoder_outputs"]["video"].pooler_output[0]
        whole.sum().backward()
        assert all(w.grad is None for w in model.vmemory.parameters())


def test_a_new_video_after_something_cached():
    model, inputs = tiny("qwen2_5_vl")
    with vmemory.attach(model, config=SMALL), torch.no_grad():
        cache = transformers.DynamicCache(config=model.config.get_text_config())
        model(input_ids=inputs["input_ids"][:, :3], past_key_values=cache)
        with pytest.raises(ValueError, match=r"past_key_values: expected an empty cache .* got one of 3 tokens"):
            model(**inputs, past_key_values=cache)
        with pytest.raises(ValueError, match="past_key_values: expected an empty cache"):
            model.generate(**inputs, **GREEDY, past_key_values=cache)


def test_twice_is_an_error_and_changes_nothing():
    model, inputs = tiny("qwen2_5_vl")
    handle = vmemory.attach(model, config=SMALL)
    short = model(**inputs).logits
    with pytest.raises(ValueError, match="expected one without a memory, got one that has one"):
        vmemory.attach(model, "dual")
    assert torch.equal(model(**inputs).logits, short)
    handle.detach()
    with pytest.raises(ValueError, match="expected a memory that is still in its model"):
        handle.detach()


def test_an_unknown_setting_is_named_with_the_nearest():
    model, _ = tiny("qwen2_5_vl")
    before = dict(model.__dict__), dict(model.config.__dict__)
    with pytest.raises(ValueError, match="'memory_capacity'; did you mean 'memory_capacities'"):
        vmemory.attach(model, config={"memory_capacity": (1, 2, 3)})
    with pytest.raises(TypeError, match="memory: expected a name"):
        vmemory.attach(model, 3)
    model.vmemory = nn.Identity()
    with pytest.raises(ValueError, match="expected no attribute 'vmemory'"):
        vmemory.attach(model, "dual")
    del model.vmemory
    assert (dict(model.__dict__), dict(model.config.__dict__)) == before


def test_a_transformers_that_is_too_old_is_named():
    model, _ = tiny("qwen2_5_vl")

    def forward(self: Any, input_ids: Any = None, pixel_values_videos: Any = None) -> None: ...

    model.__class__ = type("Older", (type(model),), {"forward": forward})
    with pytest.raises(ValueError, match=r"expected transformers 5.18 or later, whose Older.forward takes mm_encoder"):
        vmemory.attach(model)
    assert vmemory.attached(model) is None
