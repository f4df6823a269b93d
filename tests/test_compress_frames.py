"""Frame compressors: order, masks, counts and exactness."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.frame_compressors import KINDS, holes, make, video
from vmemory.compress import AdaptiveFrameResampler, CompressedFrames, FrameResampler, FrameSelector
from vmemory.testing import random_tensor


def assert_contract(out: CompressedFrames, frames: Tensor, exists: Tensor, K: int) -> None:
    B, T = frames.shape[:2]
    assert out.frames.shape == (B, K, *frames.shape[2:])
    assert out.frames.dtype == frames.dtype
    assert out.mask.shape == out.indices.shape == (B, K)
    assert out.mask.dtype == torch.bool
    assert out.indices.dtype == torch.int64
    assert out.weights.shape == (B, K, T)
    assert out.scores.shape == (B, T)
    assert torch.equal(out.mask, out.indices >= 0)
    for b in range(B):
        n = int(out.mask[b].sum())
        assert bool(out.mask[b, :n].all())
        assert bool((out.indices[b, :n].diff() > 0).all())
        assert bool(exists[b, out.indices[b, :n]].all())
        torch.testing.assert_close(out.weights[b, :n].sum(-1), torch.ones(n, dtype=out.weights.dtype))
        assert bool((out.frames[b, n:] == 0).all())
        assert bool((out.weights[b, n:] == 0).all())
    assert bool((out.weights >= 0).all())
    assert bool((out.weights.sum(1)[~exists] == 0).all())
    assert torch.equal(out.scores == -torch.inf, ~exists)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 3, 9, 12])
@pytest.mark.parametrize("masked", [False, True])
def test_fewer_frames_in_time_order_with_mask_and_indices(kind: str, T: int, masked: bool) -> None:
    module, frames = make(kind), video(5, T)
    exists = holes(5, T) if masked else torch.ones(5, T, dtype=torch.bool)
    out = module(frames, exists) if masked else module(frames)
    K = module.count(T)
    assert_contract(out, frames, exists, K)
    held = exists.sum(1)
    if "adaptive" not in kind:
        assert torch.equal(out.mask.sum(1), held.clamp_max(K))
    else:
        assert bool((out.mask.sum(1) >= held.clamp_max(2)).all())
        assert bool((out.mask.sum(1) <= held.clamp_max(5)).all())
    if "selector" in kind or "hard" in kind:
        for b, k in out.mask.nonzero().tolist():
            assert torch.equal(out.frames[b, k], frames[b, out.indices[b, k]])
    else:
        mean = torch.einsum("bkt,btchw->bkchw", out.weights, torch.where(exists[:, :, None, None, None], frames, 0))
        torch.testing.assert_close(out.frames, mean)
        # each frame belongs to one span alone, the largest share names it, and spans cover the clip
        assert torch.equal((out.weights > 0).sum(1), exists.long())
        largest = torch.where(out.mask, out.weights.argmax(-1), -1)
        assert torch.equal(largest, out.indices)


@pytest.mark.parametrize("kind", KINDS)
def test_the_content_of_missing_frames_is_not_read(kind: str) -> None:
    module, frames, exists = make(kind), video(5), holes(5, 9)
    clean = module(frames, exists)
    poisoned = module(torch.where(exists[:, :, None, None, None], frames, torch.nan), exists)
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_that_fits_comes_back_as_it_is(kind: str) -> None:
    changes = {"compression_ratio": 1.0} if kind == "selector" else {}
    if "adaptive" in kind:
        changes = {"min_output_frames": 5}
    module, frames = make(kind, **changes), video(2, 4)
    out = module(frames)
    n = frames.shape[1]
    assert torch.equal(out.frames[:, :n], frames)
    assert torch.equal(out.indices[:, :n], torch.arange(n).expand(2, -1))
    assert int(out.mask.sum()) == 2 * n


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_deterministic_and_independent_of_the_batch(kind: str) -> None:
    module, frames = make(kind, **({"dropout": 0.5})), video(3)
    first, second = module(frames), module(frames)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    alone = module(frames[1:2])
    assert torch.equal(alone.indices[0], first.indices[1])
    torch.testing.assert_close(alone.frames[0], first.frames[1])
    module.train()
    assert not torch.equal(module(frames).scores, module(frames).scores)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_low_precision_frames_and_modules(kind: str, dtype: torch.dtype) -> None:
    frames = video(dtype=dtype)
    exists = torch.ones(2, 9, dtype=torch.bool)
    module = make(kind)
    out = module(frames)
    for value in (out.weights, out.scores):
        assert value.dtype == torch.float32
    largest = out.frames.detach().double().abs().max()
    assert bool(out.frames.isfinite().all())
    assert float(largest) <= float(frames.double().abs().max()) * 1.01
    if dtype != torch.float16:
        out = module.to(dtype)(frames)
        assert out.frames.dtype == dtype
        assert out.scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(out.mask, out.indices >= 0)
        assert bool(exists[0, out.indices[0, out.mask[0]]].all())


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_leaves_pixels_alone(kind: str) -> None:
    module, frames = make(kind), video(2, 4 if "adaptive" not in kind else 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(frames)
    assert out.frames.dtype == torch.float32
    assert out.scores.dtype == torch.float32
    for b, k in out.mask.nonzero().tolist():
        assert torch.equal(out.frames[b, k], frames[b, out.indices[b, k]])


@pytest.mark.parametrize("kind", KINDS)
def test_inference_equals_training_without_dropout(kind: str) -> None:
    module, frames, exists = make(kind, dropout=0.0).train(), video(3), holes(3, 9)
    want = module(frames, exists)
    with torch.no_grad():
        got = module.eval()(frames, exists)
    assert torch.equal(got.indices, want.indices)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_equals_eager(kind: str) -> None:
    module, frames, exists = make(kind), video(3), holes(3, 9)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got, want = compiled(frames, exists), module(frames, exists)
    assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(got.frames, want.frames)
    # without a mask, and with gradients
    parameters = list(module.parameters())
    got, want = compiled(frames), module(frames)
    assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(got.frames, want.frames)
    for a, b in zip(*(torch.autograd.grad(x.frames.square().sum(), parameters) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    B=st.integers(0, 3),
    T=st.integers(1, 12),
    H=st.integers(1, 20),
    W=st.integers(1, 20),
    seed=st.integers(0, 20),
)
def test_any_shape_and_mask(kind: str, B: int, T: int, H: int, W: int, seed: int) -> None:
    module = make(kind, seed)
    frames = random_tensor(B, T, 3, H, W, seed=seed)
    exists = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 0.7
    assert_contract(module(frames, exists), frames, exists, module.count(T))


@pytest.mark.parametrize(
    ("error", "call", "words"),
    [
        (ValueError, lambda: FrameSelector(0.0), r"compression_ratio: expected a number in \(0, 1\], got 0.0"),
        (ValueError, lambda: FrameSelector(1.5), "compression_ratio: expected a number in"),
        (TypeError, lambda: FrameSelector("all"), "compression_ratio: expected a number, got str"),
        (ValueError, lambda: FrameSelector(hidden_dim=0), "hidden_dim: expected at least 1"),
        (ValueError, lambda: FrameSelector(output_frames=0), "output_frames: expected at least 1"),
        (ValueError, lambda: FrameSelector(dropout=1.0), r"dropout: expected a number in \[0, 1\)"),
        (TypeError, lambda: FrameSelector(dropout="no"), "dropout: expected a number, got str"),
        (ValueError, lambda: FrameSelector(temperature=0), "temperature: expected a positive number"),
        (ValueError, lambda: FrameResampler(0), "input_frames: expected at least 1"),
        (ValueError, lambda: FrameResampler(8, 0), "output_frames: expected at least 1"),
        (ValueError, lambda: FrameResampler(hidden_dim=10), r"hidden_dim: expected a multiple of num_heads \(8\)"),
        (ValueError, lambda: FrameResampler(num_layers=-1), "num_layers: expected at least 0"),
        (ValueError, lambda: AdaptiveFrameResampler(0), "max_input_frames: expected at least 1"),
        (ValueError, lambda: AdaptiveFrameResampler(9, 5, 4), "min_output_frames: expected between 1 and 4"),
        (ValueError, lambda: make("resampler").count(13), "frames: expected between 1 and 12"),
    ],
)
def test_bad_settings_are_named(error: type, call, words: str) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("error", "arguments", "words"),
    [
        (TypeError, ([1.0],), r"frames: expected a tensor \[B, T, C, H, W\], got list"),
        (ValueError, (torch.ones(2, 3, 8, 8),), r"frames: expected a tensor \[B, T, C, H, W\], got shape"),
        (ValueError, (torch.ones(1, 2, 4, 8, 8),), "frames: expected 3 channels"),
        (ValueError, (torch.ones(1, 0, 3, 8, 8),), "frames: expected at least 1 frame"),
        (ValueError, (torch.ones(1, 2, 3, 8, 8, dtype=torch.uint8),), "frames: expected float64"),
        (TypeError, (torch.ones(1, 2, 3, 8, 8), [True, True]), r"mask: expected a bool tensor \[1, 2\]"),
        (ValueError, (torch.ones(1, 2, 3, 8, 8), torch.ones(1, 2)), r"mask: expected bool \[1, 2\], got torch.float32"),
        (ValueError, (torch.ones(1, 2, 3, 8, 8), torch.ones(2, 2) > 0), r"mask: expected bool \[1, 2\]"),
    ],
)
def test_bad_input_is_named(kind: str, error: type, arguments: tuple, words: str) -> None:
    with pytest.raises(error, match=words):
        make(kind)(*arguments)
    if "selector" not in kind:
        with pytest.raises(ValueError, match="frames: expected at most 12 frames, got 13"):
            make(kind)(video(1, 13))
