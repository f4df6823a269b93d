"""Answer several questions about one video at the same time, behind one key-value cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vmemory.models.adapter import Adapter, Inputs
from vmemory.models.hooks import generation_setting
from vmemory.models.turn import cache_argument, cache_in
from vmemory.session.prompt import Processor, chat_text, tokenizer_of


def after_video(model: nn.Module, adapter: Adapter, processor: Processor, text: str) -> list[int]:
    """Return the ids of a question in the processor's chat template, those behind the last token of the video."""
    tokenizer = tokenizer_of(processor)
    placeholder = adapter.placeholder_id(model)
    written, token = chat_text(adapter, processor, text, placeholder)
    end = adapter.video_text([(0.0, 1)], token, 0).split(token)[-1]
    ids: list[int] = tokenizer(token + end + written.split(token)[1], add_special_tokens=False)["input_ids"]
    return ids[ids.index(placeholder) + 1 :]


def answer_together(model: Any, inputs: Inputs, tails: list[list[int]], cache: Any, most: int) -> list[list[int]]:
    """Write an answer to each of Q questions, greedily, as `generate` writes each of them.

    Args:
        model: The model.
        inputs: The prompt `[1, L]` of one of the questions, whose positions the others continue.
        tails: Ids of each question behind the video.
        cache: The cache of the prompt up to the end of the video, with a row for each question.
        most: Largest number of tokens of an answer.

    Returns:
        Ids of each answer, without the token that ends it.
    """
    ids = inputs["input_ids"]
    lengths = torch.tensor([len(tail) for tail in tails], device=ids.device)
    begin, width, rows = int(cache.get_seq_length()), int(lengths.max()), len(tails)
    new = torch.tensor([tail + [0] * (width - len(tail)) for tail in tails], device=ids.device)
    ahead = torch.arange(width, device=ids.device)
    # padding stands behind the shorter questions: nothing looks at it
    mask = torch.cat([ids.new_ones(rows, begin), (ahead < lengths[:, None]).to(ids)], 1)
    located = inputs.get("position_ids")
    first = ids.new_tensor([begin])[:, None] if located is None else located[1:, 0, begin, None]
    at = lengths - 1
    places = first[:, :, None] + ahead.expand(rows, -1)
    ends = generation_setting(model, {}, "eos_token_id")
    stop = ids.new_tensor([] if ends is None else [ends] if isinstance(ends, int) else list(ends))
    answers: list[list[int]] = [[] for _ in tails]
    open_rows = set(range(rows))
    for count in range(most):
        positions = places[0] if located is None else places
        out = model(
            input_ids=new, attention_mask=mask, position_ids=positions, use_cache=True, **{cache_argument(model): cache}
        )
        cache = cache_in(out)[1]
        chosen: Tensor = out.logits[torch.arange(rows, device=ids.device), at].argmax(-1)
        ended = torch.isin(chosen, stop).tolist()
        for row, token in enumerate(chosen.tolist()):
            if row in open_rows and ended[row]:
                open_rows.discard(row)
            elif row in open_rows:
                answers[row].append(token)
        if not open_rows:
            break
        new, at = chosen[:, None], torch.zeros_like(at)
        mask = torch.cat([mask, mask.new_ones(rows, 1)], 1)
        places = first[:, :, None] + (lengths + count)[:, None]
    return answers
