"""Banks that store tokens in 8 or 4 bits, on every policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.test_banks import DIM, GRID, clip, make, same
from tests.test_banks import POLICIES as ALL
from vmemory import banks
from vmemory.ops import dequantize_slots, quantize_slots

POLICIES = sorted(set(ALL) - {"dual"})
BITS = [("int8", 8), ("int4", 4)]
# of a value's row: half a step of rounding, and a little for sums in float32
STEP = {8: 0.5 / 127 + 1e-5, 4: 0.5 / 7 + 1e-5}


def pushed(policy: str, dtype: str | torch.dtype, frames: int, **arguments) -> banks.Bank:
    bank = make(policy, dtype=dtype, **arguments)
    video, time = clip(frames), torch.arange(frames, dtype=torch.float64) * 0.5
    for t in range(frames):
        bank.push(video[t : t + 1], time[t : t + 1])
    return bank


@pytest.mark.parametrize(("dtype", "bits"), BITS)
@pytest.mark.parametrize("frames", [0, 1, 5, 19])
@pytest.mark.parametrize("policy", POLICIES)
def test_decides_as_in_full_precision(policy: str, frames: int, dtype: str, bits: int) -> None:
    stored, full = pushed(policy, dtype, frames), pushed(policy, torch.float32, frames)
    assert stored.quantized
    assert not full.quantized
    held, wanted = stored.read(), full.read()
    assert held.tokens.dtype == torch.float32
    for name in ("frame", "cell", "level", "source"):
        assert torch.equal(getattr(held, name), getattr(wanted, name))
    for name in ("time", "weight", "start", "stop"):
        torch.testing.assert_close(getattr(held, name), getattr(wanted, name))
    same(stored.entries(), full.entries())
    # a token is rounded once when it enters and once a time it is reduced or merged
    times = {"hierarchical": 3, "merging": frames + 1}.get(policy, 1)
    largest = clip(frames).abs().max() if frames else torch.tensor(0.0)
    assert bool(((held.tokens - wanted.tokens).abs() <= times * STEP[bits] * largest).all())


@pytest.mark.parametrize(("dtype", "bits"), BITS)
@pytest.mark.parametrize("policy", ["recent", "uniform", "reservoir", "episodic"])
def test_tokens_that_stay_are_rounded_once(policy: str, dtype: str, bits: int) -> None:
    held = pushed(policy, dtype, 19).read()
    rounded = dequantize_slots(*quantize_slots(clip(19).flatten(0, 2), bits), dim=DIM)
    assert torch.equal(held.tokens, rounded[held.source])


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("policy", POLICIES)
def test_streams_apart_and_together(policy: str, dtype: str) -> None:
    together = make(policy, dtype=dtype, streams=3)
    alone = [make(policy, dtype=dtype) for _ in range(3)]
    for step, streams in enumerate([[0, 1, 2], [2, -1, 0], [1, 2, -1], [-1, -1, -1], [2, 1, 0]] * 3):
        frames = clip(6, seed=step).unflatten(0, (3, 2))
        together.push(frames, streams=torch.tensor(streams))
        for row, stream in enumerate(streams):
            if stream >= 0:
                alone[stream].push(frames[row])
    for stream, bank in enumerate(alone):
        same(together.read(stream), bank.read(), exact=True)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("policy", POLICIES)
def test_frames_of_any_dtype(policy: str, dtype: str) -> None:
    video = clip(15).to(torch.bfloat16)
    wide, narrow = make(policy, dtype=dtype), make(policy, dtype=dtype)
    wide.push(video.float())
    narrow.push(video)
    for name in ("frame", "source"):
        assert torch.equal(getattr(wide.read(), name), getattr(narrow.read(), name))
    torch.testing.assert_close(wide.read().tokens, narrow.read().tokens, rtol=0.01, atol=0.05)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("policy", POLICIES)
def test_snapshot_file_and_cast(policy: str, dtype: str, tmp_path: Path) -> None:
    bank = pushed(policy, dtype, 15)
    before, held = bank.snapshot(), bank.read()
    bank.save(tmp_path / "a.vmem")
    loaded, _ = banks.load(tmp_path / "a.vmem")
    same(loaded.read(), held, exact=True)
    bank.push(clip(4, seed=5))
    bank.restore(before)
    same(bank.half().read(), held, exact=True)
    bank.reset()
    assert len(bank.read().tokens) == 0
    assert not bank.slots.any()
    assert not bank.scale.any()


@pytest.mark.parametrize(("dtype", "fewer"), [("int8", 3), ("int4", 5)])
@pytest.mark.parametrize("policy", POLICIES)
def test_bytes(policy: str, dtype: str, fewer: float) -> None:
    size = {"dim": 512, "grid": (8, 8)}
    stored, full = make(policy, dtype=dtype, **size), make(policy, **size)
    assert stored.nbytes < full.nbytes / fewer
    bank = banks.build_memory(policy, dtype=dtype, budget="1MiB", **size)
    assert 0.8 * 2**20 < bank.nbytes <= 2**20 or policy == "hierarchical"
    assert bank.nbytes <= 2**20


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("policy", POLICIES)
def test_frames_that_are_not_finite(policy: str, dtype: str) -> None:
    video = clip(12)
    video[4] = torch.nan
    bank, full = make(policy, dtype=dtype), make(policy)
    for t in range(12):
        bank.push(video[t : t + 1])
        full.push(video[t : t + 1])
    assert torch.equal(bank.read().frame, full.read().frame)
    assert torch.equal(bank.read().tokens.isnan(), full.read().tokens.isnan())


@pytest.mark.parametrize("policy", POLICIES)
def test_compiled_push_equals_eager(policy: str) -> None:
    torch._dynamo.reset()
    eager, compiled = make(policy, dtype="int8"), make(policy, dtype="int8")
    step = torch.compile(compiled.push, fullgraph=True, backend="aot_eager", dynamic=False)
    for t in range(20):
        frame = clip(1, seed=t)
        eager.push(frame)
        step(frame)
    same(compiled.read(), eager.read(), exact=True)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("policy", POLICIES)
def test_erase(policy: str, dtype: str) -> None:
    """Rounding what was rounded changes nothing, so that the past can be repeated here too."""
    size = {"capacity": (9, 1, 3)} if policy == "hierarchical" else {"entries": 9}
    video, time = clip(30), torch.arange(30, dtype=torch.float64)
    bank, never = make(policy, dtype=dtype, **size), make(policy, dtype=dtype, **size)
    bank.push(video[:8], time[:8])
    for t in (0, 1, 5, 6, 7):
        never.push(video[t : t + 1], time[t : t + 1])
    assert bank.erase(2, 4) == 3
    assert torch.equal(bank.read().tokens, never.read().tokens)
    assert torch.equal(bank.read().time, never.read().time)
    bank.push(video[8:], time[8:])
    bank.erase(9, 12)
    held = bank.read()
    assert not bool(((held.start <= 12) & (held.stop >= 9)).any())
    free = bank.mass == 0
    assert not bank.slots[free].any()
    assert not bank.scale[free].any()


def test_refuses() -> None:
    bank = make("merging", dtype="int8")
    with pytest.raises(ValueError, match="mask: expected None, a memory in 8 or 4 bits"):
        bank.push(clip(1), mask=torch.ones(1, *GRID, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"frames: .*int32"):
        bank.push(clip(1).int())
    with pytest.raises(ValueError, match=r"frames: expected \[S, T, 4, 6, 8\]"):
        bank.push(clip(1)[..., :4])
    with pytest.raises(ValueError, match=r"snapshot.slots: expected"):
        bank.restore(make("merging").snapshot())
    for dtype in ("int3", torch.int8, torch.int64):
        with pytest.raises(ValueError, match="dtype: expected a floating dtype, 'int8' or 'int4'"):
            make("recent", dtype=dtype)
    with pytest.raises(ValueError, match=r"dtype: 'int4' expects grids .* got \(4, 6\), \(3, 5\)"):
        banks.HierarchicalBank(DIM, GRID, (2, 2), [None, (3, 5)], dtype="int4")
    with pytest.raises(ValueError, match="level: expected 'mean' for a bank in int8, got 'flat'"):
        make("episodic", dtype="int8", level="flat")
    with pytest.raises(ValueError, match="dtype: expected a floating dtype, got 'int8'"):
        make("dual", dtype="int8")
    assert bank.counts()["seen"] == 0
