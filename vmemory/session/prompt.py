"""Write the prompt of a stream for a question: ids and positions of the memory's entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vmemory.banks import MemoryTokens
from vmemory.models.adapter import Adapter
from vmemory.models.prompt import with_text_row

# the number of consecutive integers that float32 represents
_EXACT = 2**24


class HeldFrame(NamedTuple):
    """One entry of a memory: number and seconds of its (first) frame, and the cells `[n]` of its tokens.

    In a prompt, seconds count from the prompt's origin.
    """

    frame: int
    time: float
    cells: Tensor


VideoIds = Callable[[Sequence[HeldFrame]], Tensor]


class Processor(Protocol):
    """The interface of a processor or tokenizer for a session: its chat template and, optionally, `tokenizer`."""

    @property
    def apply_chat_template(self) -> Callable[..., Any]:
        """The function that writes a chat as text."""
        ...


def held_frames(memory: MemoryTokens) -> list[HeldFrame]:
    """Return the entries of tokens from `read`, in stream order."""
    frames, counts = memory.frame.unique_consecutive(return_counts=True)
    sizes = counts.tolist()
    starts = memory.start[torch.tensor([0, *sizes[:-1]]).cumsum(0).to(memory.start.device)] if sizes else memory.start
    cells = memory.cell.split(sizes)
    return [HeldFrame(f, t, c) for f, t, c in zip(frames.tolist(), starts.tolist(), cells, strict=True)]


def text_ids(
    model: nn.Module, adapter: Adapter, processor: Processor, text: str, held: Sequence[HeldFrame], tail: int
) -> Tensor:
    """Return ids `[1, L]` of a question in the processor's chat template, with the video before the question.

    Args:
        held: Entries of the memory, with seconds from the prompt's origin.
        tail: Number of placeholders after the frames.

    Raises:
        ValueError: The chat template does not write exactly one placeholder for a video.
    """
    tokenizer = tokenizer_of(processor)
    written, token = chat_text(adapter, processor, text, adapter.placeholder_id(model))
    video = adapter.video_text([(h.time, len(h.cells)) for h in held], token, tail)
    ids: Tensor = tokenizer(written.replace(token, video), return_tensors="pt", add_special_tokens=False)["input_ids"]
    return ids


def chat_text(adapter: Adapter, processor: Processor, text: str, placeholder: int) -> tuple[str, str]:
    """Return a question in the processor's chat template, and the placeholder that stands for the video in it.

    Raises:
        ValueError: The chat template does not write exactly one placeholder for a video.
    """
    content = [{"type": adapter.modality}, {"type": "text", "text": text}]
    chat = [{"role": "user", "content": content}]
    written: str = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    token: str = tokenizer_of(processor).convert_ids_to_tokens(placeholder)
    if written.count(token) != 1:
        raise ValueError(f"processor: expected a chat template that writes {token!r} once, got {written!r}")
    return written, token


def ids_with_video(ids: Tensor, placeholder: int, video: Tensor) -> Tensor:
    """Replace the only placeholder in ids `[1, L]` by the video's ids `[n]`; return `[1, L + n - 1]`.

    Raises:
        ValueError: `ids` is not one row with one placeholder.
    """
    places = (ids[0] == placeholder).nonzero().flatten().tolist()
    if ids.dim() != 2 or len(ids) != 1 or len(places) != 1:
        raise ValueError(
            f"input_ids: expected [1, L] with one {placeholder} where the video belongs, got {list(ids.shape)} "
            f"with {len(places)}"
        )
    at = places[0]
    return torch.cat([ids[0, :at], video.to(ids), ids[0, at + 1 :]])[None]


def tokenizer_of(processor: Processor) -> Any:
    """Return a processor's tokenizer, or the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def positions(
    model: nn.Module,
    adapter: Adapter,
    ids: Tensor,
    held: list[HeldFrame],
    grid: tuple[int, int],
    origin: HeldFrame | None,
) -> Tensor | None:
    """Return positions `[4, 1, L]` of a prompt `ids [1, L]` with the entries' tokens; None = plain positions.

    If text states the times, each frame starts at its own position in the text; otherwise time is the first row.

    Args:
        grid: Cells (H, W) of a frame.
        origin: The entry whose time is the start; None = the origin of the entries' seconds.

    Raises:
        ValueError: Positions are too large for float32, in which models compute rotations.
    """
    if not adapter.uses_mrope:
        return None
    visual = (ids[0] == adapter.placeholder_id(model)).tolist()
    zero = 0 if origin is None else adapter.temporal_position(model, origin.frame, origin.time)
    after_sides = adapter.frame_text or _text_after_sides(model, adapter)
    rows: list[Tensor] = []
    at, i, entries = 0, 0, iter(held)
    while i < len(visual):
        run = i
        while run < len(visual) and visual[run] == visual[i]:
            run += 1
        if not visual[i]:
            rows.append((at + torch.arange(run - i)).expand(3, -1))
            at += run - i
            i = run
            continue
        top = 0
        while i < run:
            entry = next(entries)
            cells = entry.cells.cpu()
            t = 0 if adapter.frame_text else adapter.temporal_position(model, entry.frame, entry.time) - zero
            h, w = cells // grid[1], cells % grid[1]
            rows.append(at + torch.stack([torch.full_like(cells, t), h, w]))
            top = max(top, t)
            i += len(cells)
        at += max(grid) if after_sides else max(top + 1, *grid)
    three = torch.cat(rows, 1)[:, None]
    last = int(three.max())
    if last > _EXACT:
        raise ValueError(
            f"time_origin: expected positions up to {_EXACT}, got {last}; 'oldest' counts from the oldest entry held"
        )
    three = three.to(ids.device)
    return with_text_row(three, None)


def _text_after_sides(model: Any, adapter: Adapter) -> bool:
    """Return whether text after a video continues from its height and width; upstream has changed this twice."""
    config, merge, video = (
        model.config,
        adapter.feature_module(model).visual.spatial_merge_size,
        adapter.placeholder_id(model),
    )
    frames = 9
    ids = torch.tensor([[5, config.vision_start_token_id, *[video] * frames, config.vision_end_token_id, 5]])
    prompt = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == video).int() * 2,
        "video_grid_thw": torch.tensor([[frames, merge, merge]]), "second_per_grid_ts": torch.ones(1),
        "video_second_per_grid": torch.ones(1),
    }  # fmt: skip
    located = adapter.positions(model, prompt)
    assert located is not None
    return int(located[0][0, 0, 2 + frames]) == 3
