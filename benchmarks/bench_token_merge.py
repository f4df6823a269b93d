"""Time matching and merging of tokens against the bare product of the two halves, and against ToMe's form.

ToMe also runs through torch.compile.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.peers import tome
from benchmarks.timing import Rotation
from vmemory.ops import bipartite_match, token_merge, token_unmerge
from vmemory.reference import token_merge as reference
from vmemory.testing import assert_within_budget, random_tensor

# name, sequences, tokens, channels of the metric and of the tokens
CASES = [
    ("2,048 tokens, 64", 1, 2048, 64, 64),
    ("2,048 tokens, 64 and 1,152", 1, 2048, 64, 1152),
    ("2,048 tokens, 256", 1, 2048, 256, 256),
    ("2,048 tokens, 1,152", 1, 2048, 1152, 1152),
    ("8,192 tokens, 64", 1, 8192, 64, 64),
    ("8,192 tokens, 1,152", 1, 8192, 1152, 1152),
    ("64 × 197 tokens, 64 and 768", 64, 197, 64, 768),
]
IDS = [name for name, *_ in CASES]


def inputs(B: int, N: int, D: int, C: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return metric, tokens and sizes."""
    metric, x = random_tensor(B, N, D, seed=1), random_tensor(B, N, C, seed=2)
    size = 1 + (torch.arange(N) % 3).float()[None, :, None].expand(B, -1, -1)
    return metric.to(device, dtype), x.to(device, dtype), size.to(device)


def check(metric: Tensor, x: Tensor, size: Tensor, r: int) -> None:
    """Check that the peer merges the same tokens into the same means."""
    plan = bipartite_match(metric, r)
    if metric.shape[1] <= 2048:
        # the reference works row by row, which takes too long for more rows
        assert torch.equal(plan.place, bipartite_match(metric, r, impl="reference").place)
    merged = token_merge(x, plan, size)
    exact = reference.token_merge(x.double(), size[..., 0].double(), plan.place, plan.start.shape[1] - 1)[0]
    low, total = tome.merge(x.float(), tome.match(metric.float(), r), size)
    assert torch.equal(merged.size, total)
    assert_within_budget(merged.x, low.to(x.dtype), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "B", "N", "D", "C"), CASES, ids=IDS)
@pytest.mark.benchmark(group="token_merge: match and merge a quarter of the tokens")
def test_match_and_merge(measure, device, name, B, N, D, C, dtype):
    metric, x, size = inputs(B, N, D, C, device, dtype)
    r = N // 4
    check(metric, x, size, r)
    # the bare product of the halves, each in its best layout
    a, b = metric[:, ::2].contiguous(), metric[:, 1::2].contiguous()

    def ours(metric: Tensor) -> Tensor:
        return token_merge(x, bipartite_match(metric, r), size).x

    def peer(metric: Tensor) -> Tensor:
        return tome.merge(x, tome.match(metric, r), size.to(x.dtype))[0]

    torch._dynamo.reset()
    evens, odds, width = (N + 1) // 2, N // 2, x.element_size()
    moved = metric.numel() * width + (2 * N - r) * B * C * width
    label = f"{name} {str(dtype).removeprefix('torch.')}"
    rivals = {"tome": peer, "compile": torch.compile(peer, dynamic=False), "product": lambda _: a @ b.mT}
    measure(label, ours, Rotation(metric), moved, 2.0 * B * evens * odds * D, **rivals)


@pytest.mark.benchmark(group="token_merge: merge, spread again, and the gradient of both")
def test_forward_and_backward(measure, device):
    _, x, size = inputs(1, 8192, 8, 1152, device, torch.float32)
    plan = bipartite_match(random_tensor(1, 8192, 8, device=device), 2048)

    def differentiate(x: Tensor, impl: str = "auto", size: Tensor = size) -> Tensor:
        x = x.detach().requires_grad_()
        back = token_unmerge(token_merge(x, plan, size, impl=impl).x, plan, impl=impl)
        return torch.autograd.grad(back, x, torch.ones_like(back))[0]

    exact = differentiate(x.double(), "reference", size.double())
    assert_within_budget(differentiate(x), differentiate(x, "reference"), exact)
    torch._dynamo.reset()

    @partial(torch.compile, dynamic=False)
    def compiled(x: Tensor) -> Tensor:
        merged = reference.token_merge(x, size[..., 0], plan.place, plan.start.shape[1] - 1)[0]
        return reference.token_unmerge(merged, plan.place)

    def differentiate_compiled(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        back = compiled(x)
        return torch.autograd.grad(back, x, torch.ones_like(back))[0]

    # four passes, each between 8,192 and 6,144 tokens
    moved = 4 * (8192 + 6144) * 1152 * x.element_size()
    measure(
        "8,192 tokens, 1,152",
        differentiate,
        Rotation(x),
        moved,
        moved / 4,
        eager=lambda x: differentiate(x, "reference"),
        compile=differentiate_compiled,
    )
