"""Token reducers: redundancy dropping against the originals' outputs, exact counts, provenance, gradients."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vmemory import banks
from vmemory.compress import PixelDifference, ReducedTokens, TokenDifference, pixel_difference
from vmemory.testing import assert_within_budget, random_tensor


def clip(T: int = 5, H: int = 3, W: int = 4, D: int = 6, S: int | None = None, seed: int = 0, **kind) -> Tensor:
    x = random_tensor(S or 1, T, H, W, D, seed=seed, **kind)
    return x if S else x[0]


def still(x: Tensor, seed: int = 3) -> Tensor:
    """The clip with about half of its tokens repeated from the frame before."""
    x = x.clone()
    repeat = torch.rand(x.shape[:-1], generator=torch.Generator().manual_seed(seed)) < 0.5
    for t in range(1, x.shape[-4]):
        x[..., t, :, :, :] = torch.where(repeat[..., t, :, :, None], x[..., t - 1, :, :, :], x[..., t, :, :, :])
    return x


def assert_provenance(reduced: ReducedTokens, tokens: Tensor, time: Tensor | None = None) -> None:
    """One stream's reduced tokens are the rows of `tokens [T, H, W, D]` that `source` names."""
    cells = tokens.shape[1] * tokens.shape[2]
    assert torch.equal(reduced.tokens, tokens.flatten(0, 2)[reduced.source])
    assert bool((reduced.source.diff() > 0).all())
    assert torch.equal(reduced.source, reduced.frame * cells + reduced.cell)
    assert torch.equal(reduced.level, torch.zeros_like(reduced.frame))
    assert bool((reduced.weight == 1).all())
    if time is None:
        assert bool(reduced.time.isnan().all())
    else:
        assert torch.equal(reduced.time, time[reduced.frame])
        assert torch.equal(reduced.start, reduced.time)


def test_fields_are_those_of_a_memory() -> None:
    assert ReducedTokens._fields == banks.MemoryTokens._fields


def processor_mask() -> Callable[..., Tensor]:
    """The rule of the installed transformers, taken out of its file: the file itself imports torchvision."""
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("transformers is not installed")
    file = Path(spec.submodule_search_locations[0]) / "models/video_llama_3/video_processing_video_llama_3.py"
    tree = ast.parse(file.read_text())
    found = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "_get_compression_mask")
    names: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module([found], []), str(file), "exec"), names)
    return names["_get_compression_mask"]


@pytest.mark.parametrize("merge", [1, 2])
def test_pixel_difference_equals_the_installed_processor(merge: int) -> None:
    # patches of 2 pixels, each token's merge x merge patches next to each other
    T, H, W, patch = 7, 4, 6, 2
    side = merge * patch
    frames = random_tensor(T, 3, H * side, W * side) / 1000
    frames[3], frames[4, :, :side] = frames[2], frames[3, :, :side]
    patches = frames.reshape(T, 3, H, merge, patch, W, merge, patch).permute(0, 2, 5, 3, 6, 1, 4, 7)
    mask = processor_mask()(
        None,
        patches.reshape(T * H * W * merge**2, -1),
        torch.tensor([[T, H * merge, W * merge]]),
        torch.tensor([merge]),
    )
    assert 0 < int(mask.sum()) < mask.numel()
    assert torch.equal(PixelDifference().mask(clip(T, H, W), pixels=frames).flatten(), mask)


def test_uint8_pixels_count_as_normalised_ones() -> None:
    pixels = torch.randint(0, 256, (1, 4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    normalised = (pixels.double() / 255 - 0.5) / 0.5
    wide = pixel_difference(normalised, (4, 2))
    assert wide.shape == (1, 3, 4, 2)
    assert_within_budget(pixel_difference(pixels, (4, 2)), pixel_difference(normalised.float(), (4, 2)), wide)
    one = pixels.clone()
    one[:, 1:] = one[:, :1] ^ 1
    assert bool((pixel_difference(one, (1, 1))[:, 0] == 2).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_feature_threshold_is_one_minus_cosine(dtype: torch.dtype) -> None:
    tokens, time = still(clip(6, dtype=dtype)), torch.arange(6, dtype=torch.float64) * 0.5
    wide = tokens.double()
    cosine = torch.nn.functional.cosine_similarity(wide[1:], wide[:-1], dim=-1, eps=1e-16)
    expected = torch.cat([torch.ones(1, 3, 4, dtype=torch.bool), 1 - cosine > 0.5])
    assert float((1 - cosine - 0.5).abs().min()) > 1e-3
    reduced = TokenDifference(threshold=0.5)(tokens, time)
    assert reduced.count is None
    assert reduced.source.tolist() == expected.flatten().nonzero().flatten().tolist()
    assert_provenance(reduced, tokens, time)


def test_streams_are_padded_and_equal_to_each_alone() -> None:
    tokens, time = still(clip(S=3)), torch.arange(5, dtype=torch.float64)
    reducer = TokenDifference(threshold=0.2)
    padded = reducer(tokens, time)
    assert padded.tokens.shape == (3, 60, 6)
    assert padded.count is not None
    assert len(set(padded.count.tolist())) > 1
    for s in range(3):
        alone, n = reducer(tokens[s], time), int(padded.count[s])
        for name, a, b in zip(alone._fields, padded.stream(s), alone, strict=True):
            assert (a is None and b is None) or torch.equal(a, b), name
        assert bool((padded.source[s, n:] == -1).all())
        assert bool((padded.frame[s, n:] == -1).all())
        assert bool((padded.tokens[s, n:] == 0).all())
        assert bool(padded.time[s, n:].isnan().all())
    with pytest.raises(ValueError, match="stream: expected the padded tokens"):
        reducer(tokens[0]).stream(0)


@pytest.mark.parametrize("by", ["feature", "pixel"])
@pytest.mark.parametrize("budget", [0, 1, 12, 17, 60, 500, 0.01, 0.4, 1.0])
def test_exact_counts_are_known_beforehand(by: str, budget: float) -> None:
    tokens, pixels = still(clip(S=2)), random_tensor(2, 5, 3, 6, 8, seed=8)
    reducer = TokenDifference(by, budget=budget)
    n = reducer.count(5, 12)
    assert n == (min(budget, 60) if isinstance(budget, int) else max(12, int(60 * budget)))
    extra = {"pixels": pixels} if by == "pixel" else {}
    reduced = reducer(tokens, **extra)
    assert reduced.tokens.shape == (2, n, 6)
    assert reduced.count is not None
    assert reduced.count.tolist() == [n, n]
    difference = reducer.difference(tokens, **extra).flatten(1)
    for s in range(2):
        # the best by difference, the earlier of equals
        order = difference[s].sort(descending=True, stable=True).indices[:n].sort().values
        assert torch.equal(reduced.source[s], order)
        single = reducer(tokens[s], **{k: v[s] for k, v in extra.items()})
        assert_provenance(single, tokens[s])
        assert torch.equal(single.source, order)
    mask = reducer.mask(tokens, **extra)
    assert mask.flatten(1).sum(1).tolist() == [n, n]
    assert torch.equal(mask.flatten(1).nonzero()[:, 1].reshape(2, n), reduced.source)


@pytest.mark.parametrize("by", ["feature", "pixel"])
@pytest.mark.parametrize("drop", [0, 0.05, 0.34, 0.6, 1.0])
def test_each_frame_loses_its_share(by: str, drop: float) -> None:
    tokens, pixels = still(clip(S=2)), random_tensor(2, 5, 3, 6, 8, seed=8).round()
    tokens[0, 3, 0, 0] = torch.nan
    mask = torch.rand(2, 5, 3, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    reducer = TokenDifference(by, drop=drop)
    extra = {"pixels": pixels} if by == "pixel" else {}
    for there in (None, mask):
        difference = reducer.difference(tokens, mask=there, **extra)
        exists = torch.ones(2, 5, 12, dtype=torch.bool) if there is None else there.flatten(2)
        wanted = exists.clone()
        for s in range(2):
            for t in range(1, 5):
                cells = [c for c in range(12) if exists[s, t, c] and exists[s, t - 1, c]]
                # NaN differs most, and of equals the later goes
                key = {c: (math.inf if math.isnan(d := float(difference[s, t, c])) else d, -c) for c in cells}
                for c in sorted(cells, key=key.__getitem__)[: int(len(cells) * drop)]:
                    wanted[s, t, c] = False
        assert torch.equal(reducer.mask(tokens, mask=there, **extra).flatten(2), wanted)
        reduced = reducer(tokens, mask=there, **extra)
        assert reduced.count.tolist() == wanted.sum((1, 2)).tolist()
        assert torch.equal(reduced.stream(1).source, wanted[1].flatten().nonzero().flatten())
        if there is None:
            assert reduced.count.tolist() == [reducer.count(5, 12)] * 2


@pytest.mark.parametrize(
    "arguments", [{"threshold": 0.2}, {"threshold": 0.2, "min_tokens": 2}, {"budget": 30}, {"drop": 0.4}]
)
def test_cells_that_do_not_exist_never_stay(arguments: dict) -> None:
    tokens = still(clip(S=2))
    mask = torch.rand(2, 5, 3, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[1, 2:] = False
    poisoned = torch.where(mask[..., None], tokens, torch.nan)
    reducer = TokenDifference(**arguments)
    reduced = reducer(poisoned, mask=mask)
    assert reduced.count is not None
    assert not reduced.tokens.isnan().any()
    for s in range(2):
        flat = mask[s].flatten()
        n = int(reduced.count[s])
        assert bool(flat[reduced.source[s, :n]].all())
        assert torch.equal(reducer(poisoned[s], mask=mask[s]).source, reduced.source[s, :n])
        if reducer.budget:
            assert n == min(30, int(flat.sum()))
        if reducer.min_tokens:
            per_frame = reducer.mask(poisoned, mask=mask)[s].sum((1, 2))
            assert bool((per_frame >= mask[s].sum((1, 2)).clamp_max(2)).all())


@pytest.mark.parametrize("by", ["feature", "pixel"])
@pytest.mark.parametrize("S", [None, 2])
@pytest.mark.parametrize("piece", [1, 2, 5])
def test_a_stream_in_pieces_drops_what_the_whole_does(by: str, S: int | None, piece: int) -> None:
    tokens, pixels = still(clip(11, S=S)), random_tensor(S or 1, 11, 3, 6, 8, seed=8) / 100
    pixels[:, 4] = pixels[:, 3]
    pixels = pixels if S else pixels[0]
    mask = torch.rand(tokens.shape[:-1], generator=torch.Generator().manual_seed(4)) < 0.8
    reducer = TokenDifference("feature", threshold=0.2) if by == "feature" else TokenDifference("pixel", threshold=2.8)
    along = 1 if S else 0
    compared = tokens if by == "feature" else pixels
    masks, previous = [], None
    for at in range(0, 11, piece):
        n = min(piece, 11 - at)
        shown = {"pixels": pixels.narrow(along, at, n)} if by == "pixel" else {}
        masks.append(reducer.mask(tokens.narrow(along, at, n), **shown, previous=previous))
        previous = compared.select(along, at + n - 1)
    whole = reducer.mask(tokens, **({"pixels": pixels} if by == "pixel" else {}))
    assert 0.1 < float(whole.float().mean()) < 0.9
    assert torch.equal(torch.cat(masks, along), whole)
    # a cell that is missing now is new when it comes back; those before the piece all exist
    if by == "feature":
        last = tokens.narrow(along, 10, 1)
        got = reducer.mask(last, mask=mask.narrow(along, 10, 1), previous=tokens.select(along, 9))
        assert torch.equal(got, whole.narrow(along, 10, 1) & mask.narrow(along, 10, 1))


def test_a_mask_feeds_a_memory() -> None:
    tokens = still(clip(9, 4, 4, S=1))[0]
    bank = banks.RecentBank(6, (4, 4), 5)
    mask = TokenDifference(threshold=0.2).mask(tokens)
    bank.push(tokens, mask=mask)
    held = bank.read()
    sources = mask.flatten().nonzero().flatten()
    assert held.source.tolist() == sources[sources >= 4 * 16].tolist()


def test_degenerate_clips_are_defined() -> None:
    for reducer in (TokenDifference(threshold=0.5), TokenDifference(budget=0.3), TokenDifference(budget=3)):
        assert reducer(clip(0)).tokens.shape == (0, 6)
        assert reducer(clip(2, S=2)[:0]).tokens.shape[0] == 0
        assert reducer(clip(1)).frame.max() == 0
    # one channel each: their cosine with themselves is 1 without rounding
    tokens = 2.0 * torch.eye(6)[torch.arange(12) % 6].reshape(1, 3, 4, 6).expand(4, -1, -1, -1)
    assert TokenDifference(threshold=0.01)(tokens).source.tolist() == list(range(12))
    assert TokenDifference(budget=14)(tokens).source.tolist() == list(range(14))
    # zero vectors resemble nothing; what cannot be compared stays
    assert TokenDifference(threshold=0.5)(torch.zeros(3, 2, 2, 4)).source.numel() == 12
    tokens = tokens.clone()
    tokens[2, 1, 1, 0] = torch.nan
    assert TokenDifference(threshold=0.01)(tokens).source.tolist() == [*range(12), 2 * 12 + 5, 3 * 12 + 5]
    assert TokenDifference(budget=14)(tokens).source.tolist() == [*range(12), 2 * 12 + 5, 3 * 12 + 5]


def test_key_channels_alone_decide() -> None:
    tokens = still(clip(8))
    riding = torch.cat([tokens, 100 * random_tensor(8, 3, 4, 5, seed=5)], -1)
    plain = TokenDifference(threshold=0.3)(tokens)
    keyed = TokenDifference(threshold=0.3, key_dim=6)(riding)
    assert torch.equal(plain.source, keyed.source)


@pytest.mark.parametrize("arguments", [{"threshold": 0.3}, {"budget": 20}])
def test_gradients_reach_the_tokens_that_stay(arguments: dict) -> None:
    tokens = still(clip(3, 2, 2, 4, S=2, dtype=torch.float64)).requires_grad_()
    reducer = TokenDifference(**arguments)
    reducer(tokens).tokens.sum().backward()
    assert tokens.grad is not None
    assert torch.equal(tokens.grad, reducer.mask(tokens.detach())[..., None].expand_as(tokens).double())
    assert torch.autograd.gradcheck(lambda x: reducer(x).tokens, (tokens,))


@pytest.mark.parametrize("by", ["feature", "pixel"])
@pytest.mark.parametrize("arguments", [{"threshold": 0.3}, {"budget": 20}, {"budget": 0.5}])
def test_compiled_equals_eager(by: str, arguments: dict) -> None:
    reducer = TokenDifference(by, **arguments)
    tokens, pixels = still(clip(S=2)), random_tensor(2, 5, 3, 6, 8) if by == "pixel" else None
    compiled = torch.compile(lambda x, p: reducer(x, pixels=p), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(tokens, pixels), reducer(tokens, pixels=pixels), strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    single = torch.compile(lambda x, p: reducer(x, pixels=p).tokens, fullgraph=True, backend="aot_eager")
    if "budget" in arguments:
        one = None if pixels is None else pixels[0]
        assert torch.equal(single(tokens[0], one), reducer(tokens[0], pixels=one).tokens)


@settings(max_examples=40, deadline=None)
@given(
    S=st.integers(0, 3),
    T=st.integers(0, 5),
    H=st.integers(1, 4),
    W=st.integers(1, 4),
    D=st.integers(0, 5),
    budget=st.one_of(st.integers(0, 40), st.floats(0.05, 1.0)),
    seed=st.integers(0, 10),
)
def test_budgets_hold_for_any_shape(S: int, T: int, H: int, W: int, D: int, budget: float, seed: int) -> None:
    # few distinct values make ties
    tokens = random_tensor(S, T, H, W, D, seed=seed).round()
    reducer = TokenDifference(budget=budget)
    reduced = reducer(tokens)
    n = reducer.count(T, H * W)
    assert reduced.tokens.shape == (S, n, D)
    assert reduced.source.shape == (S, n)
    assert bool((reduced.source.diff(dim=1) > 0).all())
    assert torch.equal(reduced.tokens, tokens.flatten(1, 3).gather(1, reduced.source[..., None].expand(-1, -1, D)))


@pytest.mark.parametrize(
    ("error", "arguments", "words"),
    [
        (ValueError, {}, "threshold: expected exactly one of threshold, budget and drop"),
        (ValueError, {"threshold": 0.1, "budget": 3}, "threshold: expected exactly one"),
        (ValueError, {"threshold": 0.1, "drop": 0.3}, "threshold: expected exactly one"),
        (ValueError, {"drop": 1.5}, r"drop: expected a share in \[0, 1\], got 1.5"),
        (TypeError, {"drop": "half"}, "drop: expected a number, got str"),
        (ValueError, {"by": "sound", "budget": 3}, "by: expected one of 'feature', 'pixel'"),
        (TypeError, {"threshold": "low"}, "threshold: expected a number, got str"),
        (TypeError, {"budget": "3"}, "budget: expected an int, got str"),
        (ValueError, {"budget": 1.5}, r"budget: expected a fraction in \(0, 1\]"),
        (ValueError, {"budget": -1}, "budget: expected at least 0"),
        (ValueError, {"budget": 3, "min_tokens": -1}, "min_tokens: expected at least 0"),
        (ValueError, {"budget": 3, "key_dim": 0}, "key_dim: expected at least 1"),
    ],
)
def test_bad_settings_are_named(error: type, arguments: dict, words: str) -> None:
    with pytest.raises(error, match=words):
        TokenDifference(**arguments)


@pytest.mark.parametrize(
    ("error", "reducer", "arguments", "words"),
    [
        (TypeError, {}, {"tokens": [1.0]}, r"tokens: expected a tensor \[S, T, H, W, D\]"),
        (ValueError, {}, {"tokens": torch.ones(2, 3)}, r"tokens: expected \[S, T, H, W, D\] or"),
        (ValueError, {}, {"tokens": torch.ones(2, 3, 4, 6, dtype=torch.int64)}, "tokens: expected float64"),
        (ValueError, {}, {"tokens": torch.ones(2, 0, 4, 6)}, "tokens: expected a grid of at least 1 cell"),
        (ValueError, {}, {"time": torch.zeros(4, dtype=torch.float64)}, r"time: expected shape \[5\] or \[1, 5\]"),
        (ValueError, {}, {"time": torch.zeros(5)}, "time: expected float64 seconds"),
        (TypeError, {}, {"time": [0.0]}, "time: expected a tensor"),
        (ValueError, {}, {"mask": torch.ones(5, 3, 4)}, r"mask: expected bool \[1, 5, 3, 4\]"),
        (ValueError, {}, {"pixels": torch.ones(5, 3, 6, 8)}, "pixels: expected none"),
        (ValueError, {"key_dim": 7}, {}, "key_dim: expected at most|key_dim: expected between"),
        (TypeError, {"by": "pixel"}, {}, "pixels: expected a tensor"),
        (ValueError, {"by": "pixel"}, {"pixels": torch.ones(4, 3, 6, 8)}, r"pixels: expected \[1, 5, C, h, w\]"),
        (ValueError, {"by": "pixel"}, {"pixels": torch.ones(5, 3, 7, 8)}, "pixels: expected height and width"),
        (ValueError, {}, {"previous": torch.ones(3, 4)}, r"previous: expected torch.float32 \[1, 3, 4, 6\], got"),
        (ValueError, {}, {"previous": torch.ones(3, 4, 6).half()}, "previous: expected torch.float32"),
        (TypeError, {}, {"previous": 0}, r"previous: expected a tensor \[1, 3, 4, 6\], got int"),
    ],
)
def test_bad_input_is_named(error: type, reducer: dict, arguments: dict, words: str) -> None:
    with pytest.raises(error, match=words):
        TokenDifference(**({"threshold": 0.3} | reducer))(**({"tokens": clip()} | arguments))
    if not reducer:
        with pytest.raises(ValueError, match="count: expected a reducer with a budget"):
            TokenDifference(threshold=0.3).count(5, 12)
