"""What a memory that only selects must equal: the model itself, with the dropped tokens masked out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.tiny_vlms import SIDE, Inputs
from vmemory._attach import MemoryHandle

# merged and fused tokens are no tokens of the model's own; linear attention cannot mask
MIXES, RECURRENT = ("merging", "dual"), ("qwen3_5", "qwen3_5_moe")

GREEDY = {
    "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True,
    "output_logits": True,
}  # fmt: skip


def double(model: Any, inputs: Inputs) -> tuple[Any, Inputs]:
    """In float64, where a wrong token cannot pass for rounding; seconds stay as they are."""
    wide = {
        name: x.double() if torch.is_tensor(x) and x.is_floating_point() and "second" not in name else x
        for name, x in inputs.items()
    }
    return model.double(), wide


def logits_of(model: Any, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**inputs).logits
    return out


def generated(model: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Sequences and logits of greedy decoding."""
    with torch.no_grad():
        out = model.generate(**inputs, **GREEDY)
    return out.sequences, torch.stack(out.logits)


def masked_inputs(model: Any, handle: MemoryHandle, inputs: Inputs, keep: Tensor) -> Inputs:
    """The whole prompt, dropped tokens masked, and the positions that the kept ones must have."""
    mask = inputs["attention_mask"] * keep.long()
    compact = (mask.cumsum(-1) - 1).clamp(min=0)
    located = handle._prompts.adapter.positions(model, inputs)
    if located is None:
        return {**inputs, "attention_mask": mask, "position_ids": compact}
    rows = torch.zeros_like(located[0])
    for b, kept in enumerate(mask.bool()):
        rows[:, b, kept] = _positions(model, handle, inputs, kept, b, located[0])
    return {**inputs, "attention_mask": mask, "position_ids": torch.cat([compact[None].to(rows), rows])}


def _positions(model: Any, handle: MemoryHandle, inputs: Inputs, kept: Tensor, b: int, full: Tensor) -> Tensor:
    """True positions; where text tells the time, those that the model gives the compact prompt of whole frames."""
    if not handle._prompts.adapter.frame_text:
        return full[:, b, kept]
    ids = inputs["input_ids"][b][kept][None]
    visual = ids == handle._prompts.adapter.placeholder_id(model)
    prompt = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": visual.int() * 2,
        "video_grid_thw": torch.tensor([[int(visual.sum()) // SIDE**2, 2 * SIDE, 2 * SIDE]]),
    }  # fmt: skip
    located = handle._prompts.adapter.positions(model, prompt)
    assert located is not None
    return located[0][:, 0]
