"""The contract every memory policy fulfils, run on all of them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from vmemory import banks
from vmemory.banks.dual import state as dual_state
from vmemory.banks.policies.hierarchical import split

GRID, DIM, ENTRIES = (4, 6), 8, 6
POLICIES = sorted(banks.POLICIES)
# a dual memory holds what it made of frames, and has weights: of the contract it is exempt from what only memories that
# store what they are given can promise; test_dual_memory.py has its counterparts
STORES = [policy for policy in POLICIES if policy != "dual"]


def make(policy: str, entries: int = ENTRIES, **arguments) -> banks.Bank | banks.DualMemory:
    sizes = {"hierarchical": split(entries, 3), "dual": dual_state.split(entries)}
    size = {"capacity": sizes[policy]} if policy in sizes else {"capacity": entries}
    # equal weights for all that are made
    torch.manual_seed(0)
    return banks.build_memory(policy, **({"dim": DIM, "grid": GRID} | size | arguments))


def clip(frames: int, seed: int = 0, **kind) -> Tensor:
    steps = torch.randn(frames, *GRID, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return steps.cumsum(0).to(**kind) if kind else steps.cumsum(0).float()


def same(a, b, exact: bool = False) -> None:
    for name, x, y in zip(a._fields, a, b, strict=True):
        if x is None:
            assert y is None, name
        elif exact or not x.is_floating_point():
            assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)), name
        else:
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("policy", STORES)
@pytest.mark.parametrize("frames", [0, 1, 5, 3 * ENTRIES + 1])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_compress_equals_push_and_read(policy: str, frames: int, chunk: int) -> None:
    video, time = clip(frames), torch.arange(frames, dtype=torch.float64) * 0.5
    bank = make(policy)
    for start in range(0, frames, chunk):
        bank.push(video[start : start + chunk], time[start : start + chunk])
    held = bank.read()
    same(bank.compress(video, time), held)
    assert bool((held.source.diff() > 0).all())
    assert held.source.tolist() == (held.frame * math.prod(GRID) + held.cell).tolist()
    assert bank.counts()["seen"] == frames


@pytest.mark.parametrize("policy", STORES)
def test_everything_fits_when_capacity_does(policy: str) -> None:
    video = clip(ENTRIES)
    bank = make(policy, **({"capacity": (ENTRIES,)} if policy == "hierarchical" else {}))
    bank.push(video)
    assert torch.equal(bank.read().tokens, video.flatten(0, 2))


@pytest.mark.parametrize("policy", STORES)
@pytest.mark.parametrize("kind", ["identical", "zero", "nan"])
def test_degenerate_frames_are_defined(policy: str, kind: str) -> None:
    video = clip(20)
    if kind == "identical":
        video = video[:1].expand(20, -1, -1, -1).contiguous()
    elif kind == "zero":
        video = torch.zeros_like(video)
    else:
        video[7] = torch.nan
    bank = make(policy)
    for frame in video:
        bank.push(frame[None])
    same(bank.compress(video), bank.read())
    if kind == "nan" and policy in ("hierarchical", "merging"):
        assert not bank.read().tokens.isnan().any()


@pytest.mark.parametrize("policy", STORES)
@pytest.mark.parametrize("capacity", [0, 1])
def test_capacities_zero_and_one(policy: str, capacity: int) -> None:
    bank = make(policy, **({"capacity": (capacity,)} if policy == "hierarchical" else {"capacity": capacity}))
    bank.push(clip(5))
    assert bank.entries().frame.tolist() == ([4] if capacity else [])
    assert bank.read().tokens.shape[0] == capacity * math.prod(GRID)
    same(bank.compress(clip(5)), bank.read())
    found = bank.search(torch.ones(2, DIM), 3)
    assert found.frame.tolist() == [[4, -1, -1] if capacity else [-1, -1, -1]] * 2


def test_a_tier_of_capacity_zero_passes_its_frames_on() -> None:
    bank = banks.HierarchicalBank(DIM, (4, 4), capacity=(2, 0, 3), grid_size=((4, 4), (2, 2), (1, 1)))
    bank.push(torch.randn(9, 4, 4, DIM))
    assert sorted(set(bank.read().level.tolist())) == [0, 2]
    assert bank.counts() == {"seen": 9, "skipped": 0, "dropped": 4, "held": 5}


@pytest.mark.parametrize("policy", POLICIES)
def test_streams_share_a_bank_without_touching_each_other(policy: str) -> None:
    shared = make(policy, streams=3)
    alone = [make(policy) for _ in range(3)]
    for step in range(2 * ENTRIES + 3):
        rows = [stream for stream in range(3) if (step + stream) % (stream + 1) == 0]
        frames = torch.stack([clip(1, seed=10 * step + stream) for stream in rows])
        index = torch.tensor([*rows, -1])
        shared.push(torch.cat([frames, frames[:1]]), streams=index)
        for row, stream in enumerate(rows):
            alone[stream].push(frames[row])
    for stream, bank in enumerate(alone):
        # products of more rows may add up in another order
        same(shared.read(stream), bank.read(), exact=policy != "dual")
    padded = shared.read(padded=True)
    assert padded.count is not None
    for stream in range(3):
        n = int(padded.count[stream])
        assert torch.equal(padded.source[stream, :n], alone[stream].read().source)
        assert bool((padded.frame[stream, n:] == -1).all())


@pytest.mark.parametrize("policy", POLICIES)
def test_snapshot_restore_reset_and_copy(policy: str) -> None:
    video = clip(20)
    bank = make(policy, streams=2)
    bank.push(video[:10].expand(2, -1, -1, -1, -1))
    before, held = bank.snapshot(), bank.read(1)
    twin = copy.deepcopy(bank)
    bank.push(video[10:].expand(2, -1, -1, -1, -1))
    bank.reset(streams=[0])
    assert bank.read(0).tokens.shape[0] == 0
    assert bank.counts(1)["seen"] == 20
    bank.restore(before)
    same(bank.read(1), held, exact=True)
    same(twin.read(1), held, exact=True)
    with pytest.raises(ValueError, match=r"snapshot\.\w+: expected"):
        bank.restore(make(policy).snapshot())
    bank.reset()
    same(bank.read(1), make(policy).read(), exact=True)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_failed_push_changes_nothing(policy: str) -> None:
    bank = make(policy)
    bank.push(clip(4), time=[1.0, 2.0, 3.0, 4.0])
    before = bank.snapshot()
    good = clip(2)
    for error, arguments, words in (
        (ValueError, {"frames": good[:, :2]}, r"frames: expected \[S, T, 4, 6, 8\]"),
        (ValueError, {"frames": good.double()}, r"frames: expected [\w. ]+'s dtype torch.float32"),
        (ValueError, {"frames": good[0, 0]}, r"frames: expected \[S, T, H, W, D\] or"),
        (TypeError, {"frames": good.numpy()}, "frames: expected a tensor"),
        (ValueError, {"frames": good, "time": [5.0]}, r"time: expected shape \[2\]"),
        (ValueError, {"frames": good, "time": [6.0, 5.0]}, "time: expected strictly increasing"),
        (ValueError, {"frames": good, "time": [4.0, 5.0]}, "time: expected more than 4.0 s"),
        (ValueError, {"frames": good, "time": torch.tensor([5, 6])}, "time: expected float64"),
        (ValueError, {"frames": good, "mask": torch.ones(2, 4, 5, dtype=torch.bool)}, "mask: expected"),
        (ValueError, {"frames": good[None].expand(2, -1, -1, -1, -1)}, "frames: expected 1 streams"),
        (ValueError, {"frames": good, "streams": torch.tensor([0.0])}, "streams: expected int64"),
    ):
        with pytest.raises(error, match=words):
            bank.push(**arguments)
        same(bank.snapshot(), before, exact=True)


@pytest.mark.parametrize("policy", POLICIES)
def test_times_known_to_the_host_are_checked_wherever_the_bank_is(policy: str) -> None:
    bank, frames = make(policy, device="meta"), clip(2).to("meta")
    for take_in in (bank.push, bank.compress):
        with pytest.raises(ValueError, match="time: expected strictly increasing"):
            take_in(frames, [6.0, 5.0])


@pytest.mark.parametrize("policy", POLICIES)
def test_budget_is_a_hard_bound(policy: str) -> None:
    bank = banks.build_memory(policy, dim=DIM, grid=GRID, budget="40KiB")
    assert bank.nbytes <= 40 * 1024
    bytes_before = bank.nbytes
    larger = make(policy, entries=bank.capacity + 8)
    assert larger.nbytes > 40 * 1024
    for _ in range(20):
        bank.push(clip(50))
    assert bank.nbytes == bytes_before
    with pytest.raises(ValueError, match="budget: expected at least"):
        banks.build_memory(policy, dim=DIM, grid=GRID, budget="100B")
    with pytest.raises(ValueError, match="budget: expected a size such as"):
        banks.build_memory(policy, dim=DIM, grid=GRID, budget="lots")


@pytest.mark.parametrize("policy", STORES)
def test_casting_a_model_leaves_clocks_and_descriptors_alone(policy: str) -> None:
    bank = make(policy)
    bank.push(clip(9))
    entries = bank.entries()
    bank.bfloat16()
    assert bank.slots.dtype == torch.bfloat16
    assert bank.clock.dtype == torch.float64
    same(bank.entries(), entries, exact=True)
    assert bank.state_dict() == {}
    bank.push(clip(3, dtype=torch.bfloat16))


@pytest.mark.parametrize("policy", POLICIES)
def test_saved_banks_come_back_and_broken_files_are_refused(policy: str, tmp_path) -> None:
    path = tmp_path / "film.vmem"
    bank = make(policy, dtype=torch.float16)
    bank.push(clip(20, dtype=torch.float16), time=[i / 2 for i in range(20)])
    bank.save(path, extra={"picture": torch.arange(5, dtype=torch.uint8)}, notes={"video": "film"})
    back, file = banks.load(path)
    same(back.snapshot(), bank.snapshot(), exact=True)
    assert file.extra["picture"].tolist() == [0, 1, 2, 3, 4]
    assert file.notes == {"video": "film"}
    whole = path.read_bytes()
    for broken, words in (
        (whole[: len(whole) // 2], "not a whole .vmem file"),
        (b"not a memory", "not a whole .vmem file"),
        (whole.replace(b'"version":"1"', b'"version":"9"'), "version '9', this vmemory reads version 1"),
        (whole[:-3] + b"\x01\x02\x03", "checksum"),
    ):
        path.write_bytes(broken)
        with pytest.raises(banks.BankFileError, match=words):
            banks.load(path)
    with pytest.raises(banks.BankFileError, match="no such file"):
        banks.load(tmp_path / "missing.vmem")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    import safetensors.torch

    path = tmp_path / "film.vmem"
    bank = make("recent")
    bank.push(clip(3))
    bank.save(path)
    before = path.read_bytes()

    def fail(tensors, target, metadata) -> None:
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        bank.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["film.vmem"]


@pytest.mark.parametrize("policy", POLICIES)
def test_retrieve_finds_the_frame_it_is_shown(policy: str) -> None:
    bank = make(policy)
    bank.push(clip(20), time=[i / 4 for i in range(20)])
    entries = bank.entries()
    found = bank.search(entries.descriptor, 2)
    assert torch.equal(found.frame[:, 0], entries.frame)
    assert torch.equal(found.time[:, 0], entries.time)
    assert torch.equal(found.level[:, 0], entries.level)
    torch.testing.assert_close(found.values[:, 0], torch.ones(len(entries.frame)))
    none = bank.search(-entries.descriptor, 2, threshold=2.0)
    assert bool((none.frame == -1).all())
    assert bool(none.time.isnan().all())
    with pytest.raises(ValueError, match=r"query: expected \[Q, 8\]"):
        bank.search(torch.ones(1, 3), 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_reach_the_clip_and_the_adapter(policy: str) -> None:
    adapter = banks.FeatureAdapter(5, DIM)
    bank = make(policy, adapter=adapter)
    video = torch.randn(3 * ENTRIES, *GRID, 5, requires_grad=True)
    tokens = bank.compress(video)
    tokens.tokens.square().sum().backward()
    assert video.grad is not None
    touched = video.grad.abs().sum((1, 2, 3)) > 0
    assert set(tokens.frame.tolist()) <= set(touched.nonzero().flatten().tolist())
    assert all(p.grad is not None for p in adapter.parameters())


@pytest.mark.parametrize("policy", STORES)
def test_valid_cells_alone_are_read(policy: str) -> None:
    video, mask = clip(20), torch.rand(20, *GRID, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[4] = False
    poisoned = torch.where(mask[..., None], video, torch.nan)
    bank = make(policy)
    bank.push(poisoned, mask=mask)
    held = bank.read()
    assert not held.tokens.isnan().any()
    same(bank.compress(poisoned, mask=mask), held)
    lost = {source for source, ok in enumerate(mask.flatten().tolist()) if not ok}
    if policy in ("recent", "uniform", "episodic", "reservoir"):
        assert not lost & set(held.source.tolist())


@pytest.mark.parametrize("policy", STORES)
def test_key_channels_alone_decide(policy: str) -> None:
    video = clip(25)
    riding = torch.cat([video, 100 * torch.randn(25, *GRID, 3)], dim=-1)
    plain, keyed = make(policy), make(policy, dim=DIM + 3, key_dim=DIM)
    plain.push(video)
    keyed.push(riding)
    assert torch.equal(keyed.read().source, plain.read().source)
    torch.testing.assert_close(keyed.read().tokens[:, :DIM], plain.read().tokens)


@pytest.mark.parametrize("policy", POLICIES)
def test_compiled_pushes_equal_eager_ones(policy: str) -> None:
    eager, bank = make(policy, entries=4), make(policy, entries=4)
    push = torch.compile(lambda frames: bank.push(frames), fullgraph=True, backend="aot_eager")
    video = clip(3 * 4 + 1)
    for frame in video:
        eager.push(frame[None])
        push(frame[None])
    same(bank.snapshot(), eager.snapshot(), exact=True)
    read = torch.compile(lambda: bank.read(padded=True), fullgraph=True, backend="aot_eager")
    same(read(), eager.read(padded=True), exact=True)
