"""What a dual memory keeps and how: weights, dtypes, files, budgets, compiled steps, which slots are overwritten."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vmemory import banks
from vmemory.banks.dual.state import split
from vmemory.testing import random_tensor

GRID, DIM, N = (2, 3), 16, 6


def memory_of(capacities: tuple[int, int] | None = (2, 3), **arguments: Any) -> banks.DualMemory:
    torch.manual_seed(0)
    return banks.DualMemory(DIM, GRID, capacities, **({"heads": 2} | arguments))


def video(T: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return random_tensor(T, *GRID, DIM, dtype=dtype, seed=seed)


def equal(a: Any, b: Any) -> None:
    for name, x, y in zip(a._fields, a, b, strict=True):
        assert x.dtype == y.dtype, name
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)), name


# keeping


def test_casting_leaves_times_and_means_alone() -> None:
    memory = memory_of(streams=2)
    frames = video(7).expand(2, -1, -1, -1, -1)
    memory.push(frames, time=[0.1 * t for t in range(7)])
    before = memory.snapshot()
    nn.ModuleDict({"model": memory}).bfloat16()
    for name in ("working_means", "episodic_means", "mass", "entry", "clock", "seen", "entered", "written"):
        assert torch.equal(getattr(memory, name).nan_to_num(7.0), getattr(before, name).nan_to_num(7.0)), name
        assert getattr(memory, name).dtype == getattr(before, name).dtype
    assert memory.working_keys.dtype == memory.gate_in.weight.dtype == torch.bfloat16
    out = memory.push(frames[:, :1].bfloat16())
    assert out.dtype == torch.bfloat16
    assert bool(out.isfinite().all())


def test_state_dict_holds_weights_alone_and_loading_renews_what_is_stored() -> None:
    memory, other = memory_of(), memory_of()
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.1)
    assert not [name for name in memory.state_dict() if "tokens" in name or "keys" in name.split("_")]
    assert set(memory.state_dict()) == {name for name, _ in memory.named_parameters()}
    memory.push(video(7))
    stale = memory.working_keys.clone()
    tokens = memory.episodic_tokens.clone()
    memory.load_state_dict(other.state_dict())
    assert not torch.equal(memory.working_keys, stale)
    torch.testing.assert_close(memory.working_keys, other.working.project(memory.working_tokens)[0])
    torch.testing.assert_close(memory.episodic_values, other.episodic.project(tokens)[1])
    assert torch.equal(memory.episodic_tokens, tokens)


def test_restoring_brings_back_that_cells_do_not_exist() -> None:
    memory, exists = memory_of(), random_tensor(4, *GRID) > 0
    memory.push(video(4), mask=exists)
    taken = memory.snapshot()
    want = memory.push(video(3, seed=1))
    memory.reset()
    assert memory.masked is False
    memory.restore(taken)
    assert torch.equal(memory.push(video(3, seed=1)), want)
    with pytest.raises(ValueError, match=r"snapshot\.working_tokens: expected \[1, 2, 6, 16\]"):
        memory.restore(memory_of((3, 3)).snapshot())


@pytest.mark.parametrize(
    "options",
    [{}, {"slots": "means", "rule": "bridged", "salience": 0.5, "hidden": 5}, {"residual": True, "key_dim": 10}],
)
def test_files_bring_weights_options_and_state_back(tmp_path, options: dict) -> None:
    memory = memory_of(adapter=banks.FeatureAdapter(5, DIM), **options)
    memory.push(random_tensor(6, *GRID, 5))
    memory.save(tmp_path / "m.vmem", extra={"picture": torch.arange(3)}, notes={"video": "film"})
    back, file = banks.load(tmp_path / "m.vmem")
    assert isinstance(back, banks.DualMemory)
    assert back.to_dict() == memory.to_dict()
    assert list(file.extra) == ["picture"]
    assert file.notes == {"video": "film"}
    equal(back.snapshot(), memory.snapshot())
    back.adapter = memory.adapter
    more = random_tensor(5, *GRID, 5, seed=1)
    assert torch.equal(back.push(more), memory.push(more))
    equal(back.snapshot(), memory.snapshot())


def test_budgets_pick_one_working_slot_in_five() -> None:
    assert [split(n) for n in (0, 1, 2, 5, 10, 40)] == [(0, 0), (1, 0), (1, 1), (1, 4), (2, 8), (8, 32)]
    for options in ({}, {"slots": "means"}, {"streams": 3, "dtype": torch.bfloat16}, {"key_dim": 4}):
        memory = memory_of(None, budget="64KiB", **options)
        assert memory.nbytes <= 64 * 1024
        assert memory_of(split(memory.capacity + 1), **options).nbytes > 64 * 1024
    with pytest.raises(ValueError, match="budget: expected either capacity or a budget, got both"):
        memory_of((1, 2), budget="64KiB")


def test_adapters_learn_with_the_memory() -> None:
    memory = memory_of(adapter=banks.FeatureAdapter(5, DIM))
    memory.transform(random_tensor(7, *GRID, 5)).tokens.square().sum().backward()
    assert all(bool((weight.grad != 0).any()) for weight in memory.adapter.parameters())


# compiled


@pytest.mark.parametrize(
    ("named", "options"),
    [
        (False, {}),
        (True, {"rule": "bridged", "empty": "zeros"}),
        (True, {"slots": "means", "salience": 0.5, "empty": "zeros"}),
        (True, {"residual": True, "key_dim": 10}),
    ],
)
def test_compiled_pushes_equal_eager_ones(named: bool, options: dict) -> None:
    torch._dynamo.reset()
    eager, memory = memory_of(streams=2, **options), memory_of(streams=2, **options)
    push = torch.compile(memory.push, fullgraph=True, backend="aot_eager")
    frames = torch.stack([video(16), video(16, seed=1)])
    exists = torch.stack([random_tensor(16, *GRID) > 0, random_tensor(16, *GRID, seed=1) > -1])
    for t in range(16):
        arguments: dict[str, Any] = {"time": torch.tensor([[float(t)]] * 2, dtype=torch.float64)}
        if named:
            arguments |= {"streams": torch.tensor([1, -1] if t % 3 else [1, 0]), "mask": exists[:, t : t + 1]}
        one = frames[:, t : t + 1]
        assert torch.equal(push(one, **arguments), eager.push(one, **arguments))
        equal(memory.snapshot(), eager.snapshot())


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["most-similar", "bridged"])
def test_inductor_keeps_the_order_of_reads_and_writes(rule: str) -> None:
    torch._dynamo.reset()
    eager, memory = memory_of(streams=2, rule=rule), memory_of(streams=2, rule=rule)
    push = torch.compile(memory.push, fullgraph=True)
    frames = torch.stack([video(16), video(16, seed=1)])
    for t in range(16):
        one = frames[:, t : t + 1]
        torch.testing.assert_close(push(one), eager.push(one))
        for name in ("entry", "overwrites", "seen", "entered", "written"):
            assert torch.equal(getattr(memory, name), getattr(eager, name)), name
    torch.testing.assert_close(memory.episodic_keys, eager.episodic_keys)


def test_nothing_on_the_way_of_a_push_looks_at_values() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    # fake tensors have no values: reading one, as a host that waits for a device does, raises
    with FakeTensorMode():
        memory = memory_of(streams=2, salience=0.5, rule="bridged", residual=True, key_dim=10)
        frames, exists = torch.randn(2, 3, *GRID, DIM), torch.ones(2, 3, *GRID, dtype=torch.bool)
        out = memory.push(frames, mask=exists, streams=torch.zeros(2, dtype=torch.int64))
        assert out.shape == frames.shape
        assert memory.read(padded=True).tokens.shape == (2, 5 * N, DIM)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"residual": True, "key_dim": 10}])
def test_pushes_replay_from_a_graph_without_waiting(options: dict) -> None:
    host = memory_of(streams=2, **options)
    memory = memory_of(streams=2, **options).cuda()
    frames = torch.stack([video(16), video(16, seed=1)])
    buffer = frames[:, :1].cuda()
    empty = memory.snapshot()
    memory.push(buffer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = memory.push(buffer)
    memory.restore(empty)
    for t in range(16):
        buffer.copy_(frames[:, t : t + 1])
        graph.replay()
        torch.testing.assert_close(out.cpu(), host.push(frames[:, t : t + 1]), rtol=1e-4, atol=1e-4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        memory.push(buffer)
        memory.read(padded=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# errors


@pytest.mark.parametrize(
    ("error", "arguments", "words"),
    [
        (ValueError, {"heads": 3}, "heads: expected a divisor of dim 16, got 3"),
        (ValueError, {"hidden": 0}, "hidden: expected at least 1"),
        (ValueError, {"activation": "tanh"}, "activation: expected one of 'relu', 'gelu', 'silu'"),
        (ValueError, {"empty": "none"}, "empty: expected one of 'frame', 'zeros'"),
        (ValueError, {"slots": "frames"}, "slots: expected one of 'tokens', 'means'"),
        (ValueError, {"rule": "oldest"}, "rule: expected one of 'most-similar', 'bridged'"),
        (ValueError, {"key_dim": 17}, "key_dim: expected between 1 and 16, got 17"),
        (ValueError, {"key_dim": 9}, "heads: expected a divisor of dim 9, got 2"),
        (TypeError, {"residual": 0.5}, "residual: expected True or False, got 0.5"),
        (ValueError, {"salience": 1.5}, "salience: expected None or between 0 and 1, got 1.5"),
        (ValueError, {"streams": 0}, "streams: expected at least 1"),
        (ValueError, {"capacities": (1, 2, 3)}, r"capacity: expected \(working, episodic\), got \(1, 2, 3\)"),
        (ValueError, {"capacities": (1, -2)}, "capacity: expected at least 0"),
        (TypeError, {"capacities": (1, 2.0)}, "capacity: expected an int"),
    ],
)
def test_bad_arguments_are_named(error: type[Exception], arguments: dict, words: str) -> None:
    with pytest.raises(error, match=words):
        memory_of(**arguments)


def test_a_failed_push_changes_nothing() -> None:
    memory = memory_of(streams=2)
    good = video(2).expand(2, -1, -1, -1, -1)
    memory.push(good, time=[1.0, 2.0])
    before = memory.snapshot()
    for arguments, words in (
        ({"frames": good[0]}, "frames: expected 2 streams"),
        ({"frames": good[..., :7]}, r"frames: expected \[S, T, 2, 3, 16\], got shape \[2, 2, 2, 3, 7\]"),
        ({"frames": good, "mask": torch.ones(2, 2, 2, 3)}, r"mask: expected bool \[2, 2, 2, 3\], got torch.float32"),
        ({"frames": good, "mask": torch.ones(2, 2, 3, dtype=torch.bool)}, "mask: expected"),
        ({"frames": good, "streams": torch.tensor([0])}, "frames: expected 1 streams"),
        ({"frames": good, "streams": torch.tensor([0, 1], dtype=torch.int32)}, "streams: expected int64"),
        ({"frames": good, "time": [[5.0, 6.0], [2.0, 3.0]]}, "time: expected more than 2.0 s"),
        ({"frames": good, "time": [5.0, 5.0]}, "time: expected strictly increasing"),
    ):
        with pytest.raises(ValueError, match=words):
            memory.push(**arguments)
        equal(memory.snapshot(), before)
        assert memory.masked is False
    # times of a stream that is skipped do not count
    memory.push(good, time=[[5.0, 6.0], [0.0, 1.0]], streams=torch.tensor([1, -1]))
    for call, words in (
        (lambda: memory.read(2), "stream: expected between 0 and 1, got 2"),
        (lambda: memory.entries(-1), "stream: expected between 0 and 1, got -1"),
        (lambda: memory.counts(2), "stream: expected between 0 and 1, got 2"),
        (lambda: memory.search(torch.ones(1, DIM), 1, stream=2), "stream: expected between 0 and 1, got 2"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("slots", ["tokens", "means"])
@pytest.mark.parametrize("riding", [0, 3])
def test_dual_memory_goes_back_to_before_the_span(slots, riding):
    video, time = random_tensor(30, 4, 6, 8 + riding), torch.arange(30).double() * 0.5
    arguments = {"capacity": (4, 5), "slots": slots, "streams": 2, "key_dim": 8}
    bank = banks.build_memory("dual", dim=8 + riding, grid=(4, 6), **arguments)
    before = banks.build_memory("dual", dim=8 + riding, grid=(4, 6), **arguments)
    before.load_state_dict(bank.state_dict())
    both = torch.stack([video, video.flip(0)])
    bank.push(both[:, :3], time[:3])
    before.push(both[:, :3], time[:3])
    video[3] = 1e20
    bank.push(both[:, 3:4], time[3:4])
    assert bank.erase(1.2, 1.6) == 2
    for name, x, y in zip(bank.state._fields, bank.state, before.state, strict=True):
        assert torch.equal(x[0].nan_to_num(7), y[0].nan_to_num(7)), name
    assert torch.equal(bank.read(0).tokens, before.read(0).tokens)
    assert len(bank.read(1).time) > len(bank.read(0).time)
    bank.push(both[:, 4:], time[4:])
    bank.erase(5.0, 6.0)
    assert bool((bank.read(0).time < 5).all())
    bank.push(both[:, :2], time[:2] + 100)
    assert bank.read(0).time.max() == 100.5


@pytest.mark.parametrize("riding", [0, 3])
def test_dual_memory_forks_and_is_preserved(riding: int) -> None:
    video, time = random_tensor(12, 4, 6, 8 + riding), torch.arange(12).double() * 0.5
    arguments = {"dim": 8 + riding, "key_dim": 8, "grid": (4, 6)}
    bank = banks.build_memory("dual", capacity=(9, 9), **arguments)
    bank.push(video[:8], time[:8])
    held = bank.snapshot()
    fork = bank.fork()
    fork.push(video[8:], time[8:])
    with bank.preserved():
        bank.push(video[8:], time[8:])
    for x, y in zip(bank.snapshot(), held, strict=True):
        assert torch.equal(x.nan_to_num(7), y.nan_to_num(7))
    bank.push(video[8:], time[8:])
    for x, y in zip(bank.state, fork.state, strict=True):
        assert torch.equal(x.nan_to_num(7), y.nan_to_num(7))
    then = banks.build_memory("dual", capacity=(12, 12), **arguments)
    then.load_state_dict(bank.state_dict())
    then.push(video[:8], time[:8])
    early = then.fork(1.2)
    then.reset()
    then.push(video[:3], time[:3])
    for x, y in zip(early.state, then.state, strict=True):
        assert torch.equal(x.nan_to_num(7), y.nan_to_num(7))
    with pytest.raises(ValueError, match=r"time: expected a second since which nothing was given up, got 1\.2 s"):
        bank.fork(1.2)
    for call, words in (
        (lambda: bank.fork(float("nan")), "time: expected seconds, got NaN"),
        (lambda: bank.erase(2, 1), r"t0: expected at most t1 \(1 s\), got 2"),
        (lambda: bank.erase(0, 1, stream=1), "stream: expected"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
