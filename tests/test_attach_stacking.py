"""A memory in a model beside what else people put on models: PEFT, accelerate, FSDP2, compile."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import vmemory
from tests.attaching import FAMILIES, GREEDY, SMALL, remembers, with_a_small_memory
from tests.tiny_vlms import tiny
from vmemory.banks import DualMemory


@pytest.fixture(params=FAMILIES)
def small(request: Any) -> Any:
    return with_a_small_memory(request.param)


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
    with vmemory.attach(outer, DualMemory(32, (4, 4), (2, 3), heads=2, residual=True)):
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


def test_a_sharded_generate_outlives_the_memory(small, mesh):
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model, inputs, _, answer = small
    plain = model.generate(**inputs, **GREEDY)
    handle = vmemory.attach(model, config=SMALL)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "generate")
    sharded = model.__dict__["generate"]
    assert torch.equal(model.generate(**inputs, **GREEDY), answer)
    handle.detach()
    assert model.__dict__["generate"] is sharded
    assert torch.equal(model.generate(**inputs, **GREEDY), plain)


def test_a_generate_of_the_instance_comes_back(small):
    model, inputs, _, answer = small
    calls = []

    def generate(*args: Any, **kwargs: Any) -> Any:
        calls.append(sorted(kwargs))
        return type(model).generate(model, *args, **kwargs)

    model.generate = generate
    with vmemory.attach(model, config=SMALL):
        assert torch.equal(model.generate(**inputs, **GREEDY), answer)
        assert "pixel_values_videos" not in calls[0]
    assert model.__dict__["generate"] is generate


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
    with vmemory.attach(model, memory, SMALL if memory is None else None):
        out = model(**inputs)
        assert out.logits.dtype == torch.bfloat16
        made = vmemory.compress_inputs(model, inputs)["mm_encoder_outputs"]["video"].pooler_output[0]
        assert made.dtype == torch.bfloat16
        assert model.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 4
        assert torch.equal(out.logits, plain) == bool(memory)


@pytest.mark.parametrize("family", [*FAMILIES, "llava_onevision", "qwen3_vl"])
@pytest.mark.parametrize("memory", ["hierarchical", "dual"])
def test_autocast_whose_features_are_narrower_than_the_weights(family, memory):
    model, inputs = tiny(family, T=8)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(**inputs).logits
        with vmemory.attach(model, memory):
            assert torch.equal(model(**inputs).logits, plain)
            loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            if memory == "dual":
                assert model.vmemory.alpha.grad.abs() > 0
                assert model.vmemory.alpha.dtype == torch.float32


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
