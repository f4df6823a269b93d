"""The policy of `examples/custom_policy.py` decides alike on every backend and in every storage."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vmemory import banks
from vmemory.ops.bank import bank_push_, layout_maps
from vmemory.reference.bank_layout import FRAME, BankLayout, BankState
from vmemory.testing import random_tensor

EXAMPLES = Path(__file__).parents[1] / "examples"
GRID, DIM, CAPACITY, STEPS = (2, 4), 8, 4, 16
Push = Callable[[BankState, BankLayout, Tensor, Tensor], None]


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[banks.SingleTierBank]]:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield runpy.run_path(str(EXAMPLES / "custom_policy.py"), run_name="example")["OutlierBank"]
    banks.POLICIES.pop("outliers")
    sys.modules.pop("shared")


def video(streams: int = 2) -> Tensor:
    return random_tensor(streams, STEPS, *GRID, DIM).cumsum(1)


def wanted(frames: Tensor) -> list[int]:
    """Frame numbers that the policy holds of `[T, H, W, D]`, found on lists."""
    means, held = frames.double().mean((1, 2)), list[int]()
    for t in range(len(frames)):
        if len(held) == CAPACITY:
            scores = cosine_similarity(means[held], means[held].mean(0, keepdim=True))
            held.pop(int(scores.argmax()))
        held.append(t)
    return held


def check(policy: type[banks.SingleTierBank], push: Push) -> None:
    frames = video()
    bank = policy(DIM, GRID, CAPACITY, streams=2)
    state = bank.layout.new_state(2, "cpu", frames.dtype)
    for t in range(STEPS):
        victim = bank.choose(state, frames[:, t], None).view(2, 1, 1)
        push(state, bank.layout, frames[:, t : t + 1], victim)
    held = state.entry[..., FRAME].sort(1).values
    assert held.tolist() == [wanted(stream) for stream in frames]


# under `make simt` native is the CUDA kernel
@pytest.mark.parametrize("impl", ["reference", "native"])
def test_on_a_backend(policy: type[banks.SingleTierBank], impl: str, request: pytest.FixtureRequest) -> None:
    if impl == "native":
        request.getfixturevalue("native")
    check(policy, lambda state, layout, frame, victim: bank_push_(state, layout, frame, victim=victim, impl=impl))


def test_on_triton(policy: type[banks.SingleTierBank], triton) -> None:
    def push(state: BankState, layout: BankLayout, frame: Tensor, victim: Tensor) -> None:
        maps = layout_maps(layout, frame)
        given = frame.contiguous(), None, None, None, victim, maps, *layout.kernel_args
        triton("vmemory.kernels.bank", "bank_push_", *(x[:] for x in state), *given)

    check(policy, push)


@pytest.mark.parametrize("dtype", [torch.float32, "int8", "int4"])
def test_as_a_memory(policy: type[banks.SingleTierBank], dtype: torch.dtype | str, tmp_path: Path) -> None:
    (frames,) = video(1)
    time = torch.arange(STEPS, dtype=torch.float64)
    bank = banks.build_memory("outliers", dim=DIM, grid=GRID, capacity=CAPACITY, dtype=dtype)
    assert isinstance(bank, policy)
    pytest.importorskip("vmemory._host", reason="vmemory._host is not built")
    bank.archive = banks.Archive("1MiB")
    bank.push(frames, time)
    held = wanted(frames)
    assert bank.entries().frame.tolist() == held
    assert bank.compress(frames, time).frame.unique().tolist() == held
    left = bank.archive.read(0, STEPS).frame.unique().tolist()
    assert sorted(held + left) == list(range(STEPS))
    bank.save(tmp_path / "m.vmem")
    loaded, _ = banks.load(tmp_path / "m.vmem")
    assert isinstance(loaded, policy)
    assert torch.equal(loaded.read().tokens, bank.read().tokens)


def test_a_name_belongs_to_one_class() -> None:
    class Other(banks.SingleTierBank):
        policy = "merging"

    with pytest.raises(ValueError, match="policy: expected a name that no other memory has, got 'merging'"):
        banks.register_policy(Other)
