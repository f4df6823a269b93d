"""VLM²'s dual memory: Algorithm 1 as the paper lists it, and the head module of a public repository."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.recordings import Case
from vmemory import banks
from vmemory.ops import gated_fusion
from vmemory.reference.gated_fusion import gated_fusion as reference
from vmemory.testing import assert_within_budget

# prefixes of the two attentions and of the gate's two layers
ALGORITHM = ("wa.", "ea.", "mlp.0.", "mlp.2.")
HEAD = ("w.working_attention.", "w.episodic_attention.", "w.gate_mlp.0.", "w.gate_mlp.3.")


def check(case: Case) -> None:
    if case.holds("H", "M", "E_final"):
        check_algorithm(case)
    elif case.holds("H", "M", "episodic_final"):
        check_head(case)
    else:
        case.skip()


def attention(case: Case, prefix: str) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(case.tensors["H"].shape[-1], case.facts["heads"], batch_first=True)
    module.load_state_dict(part(case, prefix))
    return module


def part(case: Case, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in case.tensors.items() if name.startswith(prefix)}


def frames_of(case: Case) -> Tensor:
    """`[T, N, 1, C]`: how the tokens of a frame lie is of no account here."""
    return case.tensors["H"].unsqueeze(2)


def memory_of(case: Case, names: tuple[str, ...], **arguments: Any) -> banks.DualMemory:
    """An empty memory with the recorded weights."""
    _, N, _, dim = frames_of(case).shape
    capacities = case.facts["L_w"], case.facts["L_e"]
    memory = banks.DualMemory(dim, (N, 1), capacities, heads=case.facts["heads"], **arguments)
    memory.working.load_attention(attention(case, names[0]))
    memory.episodic.load_attention(attention(case, names[1]))
    memory.gate_in.load_state_dict(part(case, names[2]))
    memory.gate_out.load_state_dict(part(case, names[3]))
    if memory.salience is not None:
        memory.salience.load_state_dict(part(case, "w.episodic_memory.salience_gate."))
    return memory


def in_float64(memory: banks.DualMemory) -> banks.DualMemory:
    """An empty memory with the same weights."""
    wide = banks.DualMemory(**{**memory.to_dict(), "dtype": torch.float64})
    wide.load_state_dict({name: x.double() for name, x in memory.state_dict().items()})
    return wide


def pushed(memory: banks.DualMemory, frames: Tensor, chunk: int = 1) -> Tensor:
    """M_t, `[T, N, C]`."""
    parts = [memory.push(frames[start : start + chunk]) for start in range(0, len(frames), chunk)]
    return torch.cat(parts).flatten(1, 2)


def check_algorithm(case: Case) -> None:
    facts, tensors, frames = case.facts, case.tensors, frames_of(case)
    T, L_w = len(frames), facts["L_w"]
    # the listing deletes and appends, or writes in place; then its slots do not lie in the order of time
    appends = case.path.name.endswith("delappend")
    wide = pushed(in_float64(memory_of(case, ALGORITHM)), frames.double())
    for chunk in (1, 5, T):
        memory = memory_of(case, ALGORITHM)
        assert_within_budget(pushed(memory, frames, chunk), tensors["M"], wide, f"M, {chunk} frames a push")
        entry, held = memory.entry[0, L_w:], memory.episodic_tokens[0]
        if appends:
            held, entry = held[entry.argsort()], entry.sort().values
        assert_within_budget(held, tensors["E_final"], wide[entry])
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            tokens = memory_of(case, ALGORITHM).transform(frames)
        assert_within_budget(tokens.tokens.view_as(wide).detach(), tensors["M"], wide)
        assert tokens.source.tolist() == list(range(wide[..., 0].numel()))
    if not appends:
        check_slots(case)
        check_gate(case)


def check_slots(case: Case) -> None:
    """Which slot each frame takes, and the episodic bank, whose rule it is, on the recorded results."""
    frames, memory, replaced = frames_of(case), memory_of(case, ALGORITHM), []
    for frame in frames:
        before = memory.overwrites[0].clone()
        memory.push(frame[None])
        hit = (memory.overwrites[0] - before).nonzero().flatten().tolist()
        replaced.append(hit[0] if hit else -1)
    assert replaced == case.facts["replaced_index_per_step"]
    bank, taken = banks.EpisodicBank(frames.shape[-1], tuple(frames.shape[1:3]), case.facts["L_e"], level="flat"), []
    for t, result in enumerate(case.tensors["M"].view_as(frames)):
        before = bank.entry[0, :, 0].tolist()
        bank.push(result[None])
        slot = bank.entry[0, :, 0].tolist().index(t)
        taken.append(slot if before[slot] >= 0 else -1)
    assert taken == case.facts["replaced_index_per_step"]
    assert torch.equal(bank.slots[0].view_as(case.tensors["E_final"]), case.tensors["E_final"])


def check_gate(case: Case) -> None:
    """The readings of the last frame's memories, and the fusion of the two."""
    tensors, L_w, L_e = case.tensors, case.facts["L_w"], case.facts["L_e"]
    frames, results = tensors["H"], tensors["M"]
    episodic = list(results[:L_e])
    for result in results[L_e:-1]:
        scores = torch.stack([torch.cosine_similarity(result.flatten(), slot.flatten(), dim=0) for slot in episodic])
        episodic[int(scores.argmax())] = result

    def read(prefix: str, slots: list[Tensor]) -> Tensor:
        memory = torch.cat(slots)[None]
        return attention(case, prefix)(frames[-1][None], memory, memory, need_weights=False)[0][0].detach()

    inputs = [read("wa.", list(frames[-L_w - 1 : -1])), read("ea.", episodic)]
    names = [prefix + kind for prefix in ALGORITHM[2:] for kind in ("weight", "bias")]
    inputs += [tensors[name] for name in names]
    assert_within_budget(gated_fusion(*inputs), results[-1], reference(*(x.double() for x in inputs)))


def check_head(case: Case) -> None:
    facts, tensors, frames = case.facts, case.tensors, frames_of(case)
    lengths, L_w = facts["episodic_len_per_step"], facts["L_w"]
    # the gate of this recording lets frames wait, or it has none
    salience = 0.5 if case.path.name.endswith("gate1") else None
    options = {"slots": "means", "empty": "zeros", "salience": salience}
    memory, held = memory_of(case, HEAD, **options), []
    wide = pushed(in_float64(memory), frames.double())
    M = []
    for frame in frames:
        M.append(pushed(memory, frame[None]))
        held.append(int((memory.entry[0, L_w:] >= 0).sum()))
    assert_within_budget(torch.cat(M), tensors["M"], wide)
    assert held == lengths
    if salience is None:
        assert int(memory.written) == len(frames)
    entry = memory.entry[0, L_w:][: len(tensors["episodic_final"])]
    final = memory.episodic_tokens[0, : len(entry), 0]
    assert_within_budget(final, tensors["episodic_final"], wide[entry].mean(1))
