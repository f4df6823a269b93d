"""Time attention over partly valid slots against masked attention over all slots, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.timing import Rotation
from vmemory.ops import memory_attention, quantize_slots
from vmemory.reference import memory_attention as reference
from vmemory.testing import assert_within_budget, random_tensor

SLOTS, TOKENS, HEADS, CHANNELS = 40, 196, 7, 128


def slots_of(tokens: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    query = random_tensor(1, tokens, HEADS, CHANNELS, dtype=dtype, device=device)
    keys, values = (
        random_tensor(1, SLOTS, tokens, HEADS, CHANNELS, dtype=dtype, device=device, seed=s) for s in (1, 2)
    )
    return query, keys, values


def compiled_reference() -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(reference.memory_attention, dynamic=False)


def heads_first(x: Tensor) -> Tensor:
    return (x.flatten(1, 2) if x.dim() == 5 else x).transpose(1, 2).contiguous()


@pytest.mark.benchmark(group=f"memory_attention: {TOKENS} queries, {SLOTS} × {TOKENS} slots, {HEADS} × {CHANNELS}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("valid", [SLOTS // 4, SLOTS])
def test_partly_valid(measure, device, valid, dtype):
    query, keys, values = slots_of(TOKENS, dtype, device)
    count = torch.tensor([valid], device=device)
    wide = reference.memory_attention(query.double(), keys.double(), values.double(), count)
    out = memory_attention(query, keys, values, count)
    assert_within_budget(out, reference.memory_attention(query, keys, values, count), wide)
    q, k, v = map(heads_first, (query, keys, values))
    part_k, part_v = (x[:, :, : valid * TOKENS].contiguous() for x in (k, v))
    mask = (torch.arange(SLOTS * TOKENS, device=device) < valid * TOKENS)[None, None, None]
    seen = memory_attention(query, keys, values, count).transpose(1, 2)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, attn_mask=mask), seen, rtol=2e-2, atol=2e-2)
    compiled = compiled_reference()
    size = query.element_size()
    measure(
        f"{valid} of {SLOTS} slots valid, {str(dtype).removeprefix('torch.')}",
        lambda x: memory_attention(query, x, values, count),
        Rotation(keys),
        size * 2 * (query.numel() + valid * keys[0, 0].numel()),
        4 * query.numel() * valid * TOKENS,
        masked_sdpa=lambda _: scaled_dot_product_attention(q, k, v, attn_mask=mask),
        sdpa_of_the_valid=lambda _: scaled_dot_product_attention(q, part_k, part_v),
        compile=lambda x: compiled(query, x, values, count),
    )


def differentiate(attention: Callable[..., Tensor], *x: Tensor) -> tuple[Tensor, ...]:
    leaves = [v.detach().requires_grad_() for v in x]
    out = attention(*leaves)
    return torch.autograd.grad(out, leaves, torch.ones_like(out))


@pytest.mark.benchmark(group=f"memory_attention, forward + backward: {TOKENS} queries, {SLOTS} × {TOKENS} slots")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("valid", [SLOTS // 4, SLOTS])
def test_forward_and_backward(measure, device, valid, dtype):
    query, keys, values = slots_of(TOKENS, dtype, device)
    count = torch.tensor([valid], device=device)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return memory_attention(q, k, v, count)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.memory_attention(q, k, v, count)

    x = query, keys, values
    assert_within_budget(
        differentiate(ours, *x), differentiate(plain, *x), differentiate(plain, *(v.double() for v in x))
    )
    q, k, v = map(heads_first, x)
    part_k, part_v = (x[:, :, : valid * TOKENS].contiguous() for x in (k, v))
    mask = (torch.arange(SLOTS * TOKENS, device=device) < valid * TOKENS)[None, None, None]
    compiled = compiled_reference()
    held = keys[0, 0].numel()
    measure(
        f"{valid} of {SLOTS} slots valid, {str(dtype).removeprefix('torch.')}",
        lambda x: differentiate(ours, query, x, values),
        Rotation(keys),
        # query, gradient and output in and out; valid slots read twice, the gradients of all slots written
        query.element_size() * (6 * query.numel() + 4 * valid * held + 2 * SLOTS * held),
        # two products forward, five backward
        14 * query.numel() * valid * TOKENS,
        masked_sdpa=lambda _: differentiate(lambda *x: scaled_dot_product_attention(*x, attn_mask=mask), q, k, v),
        sdpa_of_the_valid=lambda _: differentiate(scaled_dot_product_attention, q, part_k, part_v),
        compile=lambda x: differentiate(lambda *y: compiled(*y, count), query, x, values),
    )


@pytest.mark.benchmark(group=f"memory_attention: {SLOTS} × {TOKENS} slots of {HEADS} × {CHANNELS}, quantised")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_quantised(measure, device, bits, tokens):
    query, keys, values = slots_of(TOKENS, torch.float32, device)
    query, count = query[:, :tokens].contiguous(), torch.tensor([SLOTS], device=device)
    (k, key_scale), (v, value_scale) = quantize_slots(keys, bits), quantize_slots(values, bits)
    scales = {"key_scale": key_scale, "value_scale": value_scale}
    args = query, k, v, count, key_scale, value_scale
    assert_within_budget(
        memory_attention(query, k, v, count, **scales),
        reference.memory_attention(*args),
        reference.memory_attention(query.double(), *args[1:]),
    )
    floats, compiled = Rotation(keys), compiled_reference()
    measure(
        f"{tokens} queries, {bits} bits",
        lambda x: memory_attention(query, x, v, count, **scales),
        Rotation(k),
        2 * (k.numel() + 4 * key_scale.numel() + 4 * query.numel()),
        4 * query.numel() * SLOTS * TOKENS,
        float32=lambda _: memory_attention(query, floats(), values, count),
        compile=lambda x: compiled(query, x, v, count, key_scale, value_scale),
    )
