"""The dual memory beside stored outputs of the original head module and of Algorithm 1 as the paper lists it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vmemory import banks
from vmemory.testing import assert_within_budget

DIM, GRID = 32, (3, 3)


def attention(data: dict[str, Tensor], prefix: str, heads: int) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(DIM, heads, batch_first=True)
    module.load_state_dict({k.removeprefix(prefix): x for k, x in data.items() if k.startswith(prefix)})
    return module


def memory_of(data: dict[str, Tensor], facts: dict, names: tuple[str, ...], **arguments) -> banks.DualMemory:
    """A memory with the stored weights; `names` are prefixes of the two attentions and the gate's two layers."""
    heads = facts["heads"]
    memory = banks.DualMemory(DIM, GRID, (facts["L_w"], facts["L_e"]), heads=heads, **arguments)
    memory.working.load_attention(attention(data, names[0], heads))
    memory.episodic.load_attention(attention(data, names[1], heads))
    for layer, prefix in ((memory.gate_in, names[2]), (memory.gate_out, names[3])):
        layer.load_state_dict({"weight": data[prefix + "weight"], "bias": data[prefix + "bias"]})
    if memory.salience is not None:
        prefix = "w.episodic_memory.salience_gate."
        state = {k.removeprefix(prefix): x for k, x in data.items() if k.startswith(prefix)}
        memory.salience.load_state_dict(state)
    return memory


def stored(golden: Path, name: str) -> tuple[dict, dict[str, Tensor]]:
    folder = golden / "vlm2"
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


ALGORITHM = ("wa.", "ea.", "mlp.0.", "mlp.2.")
HEAD = ("w.working_attention.", "w.episodic_attention.", "w.gate_mlp.0.", "w.gate_mlp.3.")


def twice(memory: banks.DualMemory, frames: Tensor, chunk: int = 1) -> tuple[Tensor, Tensor]:
    """M_t in float32 and, with the same weights, in float64."""
    wide = banks.DualMemory(**{**memory.config(), "dtype": torch.float64})
    wide.load_state_dict({name: x.double() for name, x in memory.state_dict().items()})
    outputs = []
    for one, x in ((memory, frames), (wide, frames.double())):
        video = x.view(len(x), *GRID, DIM)
        parts = [one.push(video[start : start + chunk]) for start in range(0, len(video), chunk)]
        outputs.append(torch.cat(parts).flatten(1, 2))
    return outputs[0], outputs[1]


@pytest.mark.parametrize("chunk", [1, 5, 24])
@pytest.mark.parametrize("variant", ["inplace", "delappend"])
def test_algorithm_1(golden, variant: str, chunk: int) -> None:
    facts, data = stored(golden, f"algorithm1_reference_{variant}")
    memory = memory_of(data, facts, ALGORITHM)
    M, wide = twice(memory, data["H"], chunk)
    assert_within_budget(M, data["M"], wide)
    entry, held = memory.entry[0, facts["L_w"] :], memory.episodic_tokens[0]
    if variant == "delappend":
        # the listing deletes and appends, so its slots lie in the order of time
        held = held[entry.argsort()]
    final = wide[entry if variant == "inplace" else entry.sort().values]
    assert_within_budget(held, data["E_final"], final)


def test_the_slots_that_algorithm_1_replaces(golden) -> None:
    facts, data = stored(golden, "algorithm1_reference_inplace")
    memory, replaced = memory_of(data, facts, ALGORITHM), []
    for frame in data["H"]:
        before = memory.overwrites[0].clone()
        memory.push(frame.view(1, *GRID, DIM))
        hit = (memory.overwrites[0] - before).nonzero().flatten().tolist()
        replaced.append(hit[0] if hit else -1)
    assert replaced == facts["replaced_index_per_step"]


@pytest.mark.parametrize("gate", [0, 1])
def test_the_head_module(golden, gate: int) -> None:
    facts, data = stored(golden, f"dual_module_head_gate{gate}")
    memory = memory_of(data, facts, HEAD, slots="means", empty="zeros", salience=0.5 if gate else None)
    M, wide = twice(memory, data["H"])
    assert_within_budget(M, data["M"], wide)
    held = (memory.entry[0, facts["L_w"] :] >= 0).sum()
    assert int(held) == facts["episodic_len_per_step"][-1]
    assert int(memory.written) == (24 if not gate else facts["episodic_len_per_step"][-1])
    entry = memory.entry[0, facts["L_w"] :][: len(data["episodic_final"])]
    assert_within_budget(memory.episodic_tokens[0, : len(entry), 0], data["episodic_final"], wide[entry].mean(1))


def test_the_gate_lets_through_what_the_head_module_does(golden) -> None:
    facts, data = stored(golden, "dual_module_head_gate1")
    memory = memory_of(data, facts, HEAD, slots="means", empty="zeros", salience=0.5)
    lengths = []
    for frame in data["H"]:
        memory.push(frame.view(1, *GRID, DIM))
        lengths.append(int((memory.entry[0, facts["L_w"] :] >= 0).sum()))
    assert lengths == facts["episodic_len_per_step"]


def test_all_of_a_clip_at_once_equals_the_original(golden) -> None:
    facts, data = stored(golden, "algorithm1_reference_inplace")
    memory = memory_of(data, facts, ALGORITHM)
    _, wide = twice(memory, data["H"])
    clip = data["H"].view(24, *GRID, DIM)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            tokens = memory.transform(clip)
        assert_within_budget(tokens.tokens.view(24, 9, DIM).detach(), data["M"], wide)
        assert tokens.source.tolist() == list(range(24 * 9))


def test_attention_weights_that_do_not_fit_are_named() -> None:
    memory = banks.DualMemory(DIM, GRID, (2, 2), heads=4)
    before = memory.working.query.weight.clone()
    with pytest.raises(ValueError, match="attention: expected 32 channels and 4 heads, got 32 and 8"):
        memory.working.load_attention(nn.MultiheadAttention(DIM, 8))
    with pytest.raises(ValueError, match="attention: expected one size for query, key and value, biases"):
        memory.working.load_attention(nn.MultiheadAttention(DIM, 4, bias=False))
    assert torch.equal(memory.working.query.weight, before)
