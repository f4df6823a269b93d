"""The dual memory beside Algorithm 1 written with lists; recordings of the originals are judged in test_golden.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, linear

from vmemory import banks
from vmemory.banks.dual.step import MemoryReader
from vmemory.testing import assert_within_budget, random_tensor

GRID, DIM, N = (2, 3), 8, 6


def memory_of(capacities: tuple[int, int] = (2, 3), **arguments: Any) -> banks.DualMemory:
    torch.manual_seed(0)
    memory = banks.DualMemory(DIM, GRID, capacities, **({"heads": 2, "dtype": torch.float64} | arguments))
    # biases that are not zero, a salience near its threshold, and a share of the memory that counts
    with torch.no_grad():
        for name, weight in memory.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.3)
        if memory.alpha is not None:
            memory.alpha.fill_(0.6)
    return memory


def video(T: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return random_tensor(T, *GRID, DIM, dtype=dtype, seed=seed)


def attend(reader: MemoryReader, frame: Tensor, slots: Tensor) -> Tensor:
    key, value = linear(slots, reader.key_value.weight, reader.key_value.bias).chunk(2, -1)
    q, k, v = (x.unflatten(-1, (reader.heads, -1)).transpose(0, 1) for x in (reader.query(frame), key, value))
    read = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    return reader.out(read.transpose(0, 1).flatten(1))


class Plain:
    """Algorithm 1 on lists of (number, a whole frame, what is attended to), with a memory's weights and options."""

    def __init__(self, memory: banks.DualMemory, through_slots: bool = False) -> None:
        self.memory, self.through = memory, through_slots
        self.working: list[tuple[int, Tensor, Tensor]] = []
        self.episodic: list[tuple[int, Tensor, Tensor]] = []
        self.overwrites = [0] * memory.capacities[1]
        self.seen = 0

    def held(self, frame: Tensor) -> Tensor:
        return frame if self.memory.slots == "tokens" else frame.mean(0, keepdim=True)

    def recall(self, reader: MemoryReader, frame: Tensor, slots: list[tuple[int, Tensor, Tensor]]) -> Tensor:
        if slots:
            return attend(reader, frame, torch.cat([tokens for *_, tokens in slots]))
        if self.memory.empty == "frame":
            return attend(reader, frame, self.held(frame))
        return torch.zeros_like(frame)

    def victim(self, m: Tensor) -> int:
        whole = [x for _, x, _ in self.episodic]
        if self.memory.rule == "bridged":
            order = sorted(range(len(whole)), key=lambda i: self.episodic[i][0])
            line = [whole[i].mean(0) for i in order] + [m.mean(0)]
            bridges = [float(cosine_similarity(a, b, dim=0)) for a, b in zip(line, line[2:], strict=False)]
            return order[1 + bridges.index(max(bridges))] if bridges else 0
        scores = [float(cosine_similarity(x.flatten(), m.flatten(), dim=0).detach()) for x in whole]
        return scores.index(max(scores))

    def push(self, frame: Tensor, cells: Tensor) -> Tensor:
        """`frame [N, D]` with cells `[N]` that exist; M_t `[N, D]`."""
        memory, out = self.memory, torch.zeros_like(frame)
        h = frame[cells]
        by_working = self.recall(memory.working, h, self.working)
        by_episodic = self.recall(memory.episodic, h, self.episodic)
        hidden = memory.gate_in(torch.cat([by_working, by_episodic], -1)).relu()
        gate = memory.gate_out(hidden).sigmoid()
        m = gate * by_working + (1 - gate) * by_episodic
        if memory.alpha is not None:
            m = h + memory.alpha * (m - h)
        number, self.seen = self.seen, self.seen + 1
        L_w, L_e = memory.capacities
        kept_h, kept_m = (h, m) if self.through else (h.detach(), m.detach())
        if bool(cells.any()):
            self.working = [*self.working, (number, kept_h, self.held(kept_h))][-L_w:] if L_w else []
            if (
                memory.salience is None
                or float(memory.salience(m.detach().mean(0)).sigmoid().detach()) >= memory.threshold
            ):
                # the flattened cosine is over all cells, those that do not exist as zeros
                slot = (number, torch.zeros_like(frame).index_put((cells,), kept_m) if memory.slots == "tokens" else
                        self.held(kept_m), self.held(kept_m))  # fmt: skip
                if len(self.episodic) < L_e:
                    self.episodic.append(slot)
                elif L_e:
                    at = self.victim(slot[1])
                    self.overwrites[at] += 1
                    self.episodic[at] = slot
        return out.index_put((cells,), m)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_option_equals_algorithm_1_on_lists(data) -> None:
    draw = data.draw
    memory = memory_of(
        draw(st.tuples(st.integers(0, 4), st.integers(0, 4))),
        empty=draw(st.sampled_from(["frame", "zeros"])),
        slots=draw(st.sampled_from(["tokens", "means"])),
        rule=draw(st.sampled_from(["most-similar", "bridged"])),
        salience=draw(st.sampled_from([None, 0.45, 0.5])),
        residual=draw(st.booleans()),
        hidden=draw(st.sampled_from([None, 5])),
    )
    T, chunk = draw(st.integers(0, 14)), draw(st.integers(1, 6))
    frames, exists = video(T), None
    if draw(st.booleans()):
        exists = random_tensor(T, *GRID, seed=draw(st.integers(0, 9))) > draw(st.sampled_from([-0.5, 0.5]))
        frames = torch.where(exists[..., None], frames, torch.nan)
    plain, got, want = Plain(memory), [], []
    for start in range(0, T, chunk):
        part = slice(start, start + chunk)
        got.append(memory.push(frames[part], mask=None if exists is None else exists[part]))
    with torch.no_grad():
        for t in range(T):
            cells = torch.ones(N, dtype=torch.bool) if exists is None else exists[t].flatten()
            want.append(plain.push(frames[t].flatten(0, 1), cells))
    if T:
        torch.testing.assert_close(torch.cat(got).flatten(1, 2), torch.stack(want))
    held, L_w = memory.entry[0].tolist(), memory.capacities[0]
    assert sorted(f for f in held[:L_w] if f >= 0) == [number for number, *_ in plain.working]
    assert [f for f in held[L_w:] if f >= 0] == [number for number, *_ in plain.episodic]
    assert memory.overwrites[0].tolist() == plain.overwrites
    tokens = memory.read()
    stored = sorted([(f, 0, x) for f, _, x in plain.working] + [(f, 1, x) for f, _, x in plain.episodic],
                    key=lambda slot: slot[:2])  # fmt: skip
    if stored and exists is None and memory.slots == "means":
        torch.testing.assert_close(tokens.tokens, torch.cat([x for *_, x in stored]))
    assert float(tokens.weight.sum()) == sum(N if exists is None else int(exists[f].sum()) for f, *_ in stored)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_that_of_the_lists(dtype: torch.dtype) -> None:
    # all frames fit, so that no decision is taken on rounded values
    memory, wide, every = memory_of((2, 6)).to(dtype), memory_of((2, 6)).to(dtype).double(), torch.ones(N) > 0
    frames, plain = video(6, dtype=dtype), Plain(memory)
    low = torch.stack([plain.push(frame.flatten(0, 1), every) for frame in frames])
    assert_within_budget(memory.push(frames).flatten(1, 2), low, wide.push(frames.double()).flatten(1, 2))


@pytest.mark.parametrize("through_slots", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"slots": "means", "empty": "zeros"}, {"salience": 0.5}, {"residual": True}],
)
def test_gradients_are_those_of_the_lists(options: dict, through_slots: bool) -> None:
    memory = memory_of(**options)
    clip = video(9).requires_grad_()
    probe = random_tensor(9, N, DIM, dtype=torch.float64, seed=5)
    weights = [w for name, w in memory.named_parameters() if not name.startswith("salience")]
    found = memory.transform(clip, through_slots=through_slots).tokens.view(9, N, DIM)
    plain = Plain(memory, through_slots)
    every = torch.ones(N, dtype=torch.bool)
    wanted = torch.stack([plain.push(frame.flatten(0, 1), every) for frame in clip])
    torch.testing.assert_close(found, wanted)
    got, want = (torch.autograd.grad((x * probe).sum(), [clip, *weights]) for x in (found, wanted))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert all(bool((g != 0).any()) for g in got)


def test_through_slots_lets_a_later_frame_teach_an_earlier_one() -> None:
    memory = memory_of()
    for through_slots in (False, True):
        clip = video(6).requires_grad_()
        memory.transform(clip, through_slots=through_slots).tokens[-N:].sum().backward()
        reached = (clip.grad.flatten(1) != 0).any(1).tolist()
        # working holds frames 3 and 4; what was fused earlier is reached through the episodic slots
        assert reached == [through_slots] * 5 + [True]


def test_keys_and_values_are_projected_once_a_frame() -> None:
    memory, rows = memory_of((4, 9)), {"working": 0, "episodic": 0}
    for name in rows:

        def count(module, arguments, output, name=name) -> None:  # fmt: skip
            rows[name] += output[..., 0].numel()

        getattr(memory, name).key_value.register_forward_hook(count)
    for step in range(20):
        memory.push(video(1, seed=step))
    # H_t once for the working memory; for the episodic H_t, in case that is empty, and M_t
    assert rows == {"working": 20 * N, "episodic": 40 * N}


def test_memory_is_read_before_it_is_written() -> None:
    memory = memory_of(empty="zeros")
    first = memory.push(video(1))
    # both memories are empty, so nothing of the frame comes through
    assert torch.equal(first, torch.zeros_like(first))
    second = memory.push(video(1))
    assert bool((second != 0).any())


def test_provenance_of_what_is_read() -> None:
    memory = memory_of((2, 3), rule="bridged")
    frames = video(7)
    fused = memory.push(frames, time=[t / 2 for t in range(7)])
    held = memory.read()
    assert held.frame[held.level == 0].unique().tolist() == [5, 6]
    assert held.time.tolist() == (held.frame / 2).tolist()
    assert held.source.tolist() == (held.frame * N + held.cell).tolist()
    assert bool((held.source.diff() >= 0).all())
    assert bool((held.weight == 1).all())
    for level, whole in ((0, frames), (1, fused)):
        mine = held.level == level
        torch.testing.assert_close(held.tokens[mine], whole.flatten(0, 2)[held.source[mine]])
        assert len(held.source[mine].unique()) == int(mine.sum())
    assert memory.counts().items() >= {"seen": 7, "entered": 7, "written": 7, "held": 5}.items()
    assert memory.counts()["dropped"] == 7 - len(held.frame.unique())


def test_a_clip_becomes_one_token_for_each_of_its_own() -> None:
    memory = memory_of()
    memory.push(video(4, seed=3))
    before = memory.snapshot()
    exists = random_tensor(2, 5, *GRID) > 0
    clips, time = torch.stack([video(5), video(5, seed=1)]), torch.arange(5.0, dtype=torch.float64)
    padded = memory.transform(clips, time, mask=exists)
    for stream in range(2):
        alone = memory.compress(clips[stream], time, mask=exists[stream])
        assert alone.source.tolist() == exists[stream].flatten().nonzero().flatten().tolist()
        assert alone.time.tolist() == time[alone.source // N].tolist()
        n = int(padded.count[stream])
        assert torch.equal(padded.source[stream, :n], alone.source)
        assert bool((padded.source[stream, n:] == -1).all())
        torch.testing.assert_close(padded.tokens[stream, :n], alone.tokens)
    whole = memory.transform(clips[0])
    assert whole.source.tolist() == list(range(5 * N))
    assert bool(whole.time.isnan().all())
    assert memory.transform(clips[0, :0]).tokens.shape == (0, DIM)
    assert all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(before, memory.state, strict=True))


@pytest.mark.parametrize("empty", ["frame", "zeros"])
@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize("chunk", [1, 12])
def test_a_broken_frame_enters_neither_memory(empty: str, first: int, chunk: int) -> None:
    frames = video(12)
    broken, whole = frames.clone(), memory_of(empty=empty)
    broken[first, 0, 1, 2] = torch.nan
    broken[first + 1, 1, 1] = torch.inf
    memory = memory_of(empty=empty)
    out = torch.cat([memory.push(broken[t : t + chunk]) for t in range(0, 12, chunk)])
    fine = [t for t in range(12) if t not in (first, first + 1)]
    torch.testing.assert_close(out[fine], whole.push(frames[fine]))
    if empty != "zeros":
        assert bool(out[first].isnan().any())
    assert not set(memory.entries().frame.tolist()) & {first, first + 1}
    assert memory.counts().items() >= {"seen": 12, "entered": 10, "written": 10, "held": 5}.items()
    assert bool(memory.read().tokens.isfinite().all())


def test_an_overflowing_answer_enters_the_working_memory_alone() -> None:
    memory = memory_of()
    with torch.no_grad():
        memory.working.out.bias.fill_(torch.inf)
    memory.push(video(3))
    assert memory.counts().items() >= {"seen": 3, "entered": 3, "written": 0, "held": 2}.items()


@pytest.mark.parametrize(("rule", "overwrites"), [("most-similar", [5, 0, 0]), ("bridged", [0, 3, 2])])
@pytest.mark.parametrize("bias", [0.0, 0.3])
def test_of_equal_slots_the_first_that_may_go_is_replaced(rule: str, overwrites: list[int], bias: float) -> None:
    memory = memory_of((1, 3), rule=rule)
    with torch.no_grad():
        # every M_t is the same, for bias 0 zero
        for name, weight in memory.named_parameters():
            weight.fill_(bias if name.endswith("out.bias") else 0)
    out = memory.push(video(1).expand(8, -1, -1, -1))
    assert torch.equal(out, torch.full_like(out, bias))
    assert memory.overwrites[0].tolist() == overwrites
    assert memory.counts().items() >= {"seen": 8, "entered": 8, "written": 8, "held": 4}.items()


@pytest.mark.parametrize("capacities", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("slots", ["tokens", "means"])
def test_capacities_zero_and_one(capacities: tuple[int, int], slots: str) -> None:
    memory = memory_of(capacities, slots=slots)
    out = memory.push(video(5))
    assert out.shape == (5, *GRID, DIM)
    assert bool(out.isfinite().all())
    entries = memory.entries()
    assert entries.frame.tolist() == [4] * sum(capacities)
    assert entries.level.tolist() == [level for level in (0, 1) if capacities[level]]
    found = memory.search(torch.ones(2, DIM), 3)
    assert (found.frame == 4).sum(1).tolist() == [sum(capacities)] * 2
    assert (found.level >= 0).sum(1).tolist() == [sum(capacities)] * 2
    torch.testing.assert_close(memory.transform(video(5)).tokens, out.flatten(0, 2))


def test_nothing_pushed_changes_nothing() -> None:
    memory = memory_of(streams=2)
    memory.push(video(2).expand(2, -1, -1, -1, -1))
    before = memory.snapshot()
    assert memory.push(video(0).expand(2, -1, -1, -1, -1)).shape == (2, 0, *GRID, DIM)
    assert memory.push(video(1)[None][:0], streams=torch.zeros(0, dtype=torch.int64)).shape == (0, 1, *GRID, DIM)
    assert all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(before, memory.state, strict=True))
    skipped = memory.push(video(1)[None].expand(3, -1, -1, -1, -1), streams=torch.tensor([-1, -2, -7]))
    assert bool((skipped == 0).all())
    assert all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(before, memory.state, strict=True))


@pytest.mark.parametrize("options", [{}, {"salience": 0.5}, {"rule": "bridged", "empty": "zeros"}])
def test_streams_named_in_any_order_are_fed_alone(options: dict) -> None:
    shared, alone = memory_of(streams=3, **options), [memory_of(**options) for _ in range(3)]
    for step in range(11):
        rows = [stream for stream in (2, 0, 1) if (step + stream) % (stream + 1) == 0]
        frames = torch.stack([video(2, seed=7 * step + stream) for stream in (*rows, 9)])
        exists = random_tensor(len(rows) + 1, 2, *GRID, seed=step) > -1 if step > 6 else None
        out = shared.push(frames, mask=exists, streams=torch.tensor([*rows, -1]))
        for row, stream in enumerate(rows):
            want = alone[stream].push(frames[row], mask=None if exists is None else exists[row])
            torch.testing.assert_close(out[row], want)
        assert bool((out[-1] == 0).all())
    for stream, memory in enumerate(alone):
        got, want = shared.read(stream), memory.read()
        assert torch.equal(got.source, want.source)
        torch.testing.assert_close(got.tokens, want.tokens)


def test_attention_weights_that_do_not_fit_are_named() -> None:
    memory = banks.DualMemory(DIM, GRID, (2, 2), heads=4)
    before = memory.working.query.weight.clone()
    with pytest.raises(ValueError, match="attention: expected 8 channels and 4 heads, got 8 and 8"):
        memory.working.load_attention(nn.MultiheadAttention(DIM, 8))
    with pytest.raises(ValueError, match="attention: expected one size for query, key and value, biases"):
        memory.working.load_attention(nn.MultiheadAttention(DIM, 4, bias=False))
    assert torch.equal(memory.working.query.weight, before)
