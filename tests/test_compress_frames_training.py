"""Frame compressors learn: gradients reach what decides, and the decisions follow them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.frame_compressors import KINDS, make, video
from vmemory.compress import AdaptiveFrameResampler, FrameResampler, FrameSelector


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter_and_the_frames(kind: str) -> None:
    module, frames = make(kind).train(), video(2).requires_grad_()
    target = video(2, module.count(9), seed=7)
    out = module(frames)
    (out.frames * target).square().sum().backward()
    # a bias shifts all logits of a softmax alike; one projection of the key stands for the same
    shifts = {"scorer.bias", "scorer.4.bias", "key.bias"}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        if name not in shifts and not name.startswith("layers.0.self_attn.in_proj_bias"):
            assert float(parameter.grad.abs().max()) > 0, name
    assert frames.grad is not None
    shown = torch.zeros(2, 9, dtype=torch.bool)
    for b, k in out.mask.nonzero().tolist():
        shown[b, out.indices[b, k]] = True
    assert bool((frames.grad.abs().sum((2, 3, 4)) > 0)[shown].all())


@pytest.mark.parametrize("kind", ["selector", "hard resampler", "hard adaptive"])
def test_picks_pass_on_the_gradient_of_the_weighted_mean(kind: str) -> None:
    module, frames = make(kind).double(), video(2, dtype=torch.float64)
    target = video(2, module.count(9), seed=7, dtype=torch.float64)
    out = module(frames)
    got = torch.autograd.grad((out.frames * target).sum(), list(module.parameters()), allow_unused=True)
    out = module(frames)
    mean = torch.einsum("bkt,btchw->bkchw", out.weights, frames)
    want = torch.autograd.grad((mean * target).sum(), list(module.parameters()), allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a, b)
    picked = copy.deepcopy(frames).requires_grad_()
    module.requires_grad_(False)
    out = module(picked)
    weights = out.weights.detach()
    (grad,) = torch.autograd.grad((out.frames * target).sum(), picked, retain_graph=True)
    (through,) = torch.autograd.grad((out.weights * torch.einsum("bkchw,btchw->bkt", target, frames)).sum(), picked)
    direct = torch.zeros_like(frames)
    for b, k in out.mask.nonzero().tolist():
        direct[b, out.indices[b, k]] += target[b, k]
    torch.testing.assert_close(grad, direct + through)
    assert weights.requires_grad is False


@pytest.mark.parametrize("kind", ["resampler", "adaptive"])
def test_mixing_passes_gradcheck(kind: str) -> None:
    module = make(kind).double()
    frames = video(1, 5, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: module(x).frames, (frames,), fast_mode=True)
    weight = module.scorer.weight.detach().clone().requires_grad_()

    def run(weight: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"scorer.weight": weight}, (frames.detach(),)).frames

    assert torch.autograd.gradcheck(run, (weight,), fast_mode=True)


def test_a_selector_learns_which_frames_are_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    module = FrameSelector(hidden_dim=16, output_frames=2)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)

    def batch(n: int) -> tuple[Tensor, Tensor]:
        frames = torch.randn(n, 6, 3, 16, 16, generator=generator) * 0.3
        wanted = torch.rand(n, 6, generator=generator).argsort(1)[:, :2].sort(1).values
        frames[torch.arange(n)[:, None], wanted, 0] += 2.0
        return frames, wanted

    def hits() -> float:
        frames, wanted = batch(64)
        return float((module.eval()(frames).indices == wanted).float().mean())

    before = hits()
    module.train()
    for _ in range(40):
        frames, _ = batch(16)
        loss = -module(frames).frames[:, :, 0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.7
    assert hits() > 0.95


def test_adaptive_asks_for_more_frames_where_more_is_new() -> None:
    module = make("adaptive")
    with torch.no_grad():
        module.scorer.weight.zero_()
        for bias, frames in ((-10.0, 2), (10.0, 5), (torch.logit(torch.tensor(1 / 3)), 3)):
            module.scorer.bias.fill_(bias)
            out = module(video())
            assert out.mask.sum(1).tolist() == [frames, frames]
    scores = torch.tensor([[-9.0, 5.0, -9.0, -9.0, 6.0, 9.0, -9.0]])
    span, count = module.spans(scores, torch.ones(1, 7, dtype=torch.bool))
    assert count.tolist() == [3]
    assert span.tolist() == [[0, 0, 0, 0, 1, 2, 2]]
    exists = torch.tensor([[False, True, True, False, True, False, True]])
    span, count = module.spans(scores, exists)
    assert count.tolist() == [2]
    assert span[exists].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("make_module", [
    lambda: FrameSelector(output_frames=12),
    lambda: FrameResampler(),
    lambda: AdaptiveFrameResampler(min_output_frames=12, max_output_frames=12),
])  # fmt: skip
def test_twelve_frames_of_224_pixels_for_stop(make_module) -> None:
    torch.manual_seed(0)
    module = make_module()
    frames = video(1, 20, 224)
    out = module(frames)
    assert out.frames.shape == (1, 12, 3, 224, 224)
    assert bool(out.mask.all())
    out.frames.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in module.parameters())
    short = module.eval()(frames[:, :7])
    assert short.frames.shape == (1, 12, 3, 224, 224)
    assert short.mask.tolist() == [[True] * 7 + [False] * 5]
