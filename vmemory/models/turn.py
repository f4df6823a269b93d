"""The caller's prompt together with the shortened one, for logits and for later turns on a cache."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

Inputs = dict[str, Any]
_TURN = "_vmemory_turn"


class Turn(NamedTuple):
    """A shortened prompt.

    Attributes:
        ids: `[B, L]` int64, the caller's prompt.
        seen: `[B, L']` int64, the prompt that the model read.
        mask: `[B, L']` int64, the attention mask of `seen`.
        column: `[B, L]` int64: the column of `seen` for each of `ids`, or the last kept column before a removed token.
        offset: `[B, 1]` int64, the offset of later positions from plain ones, for models with three-row positions; else
            None.
    """

    ids: Tensor
    seen: Tensor
    mask: Tensor
    column: Tensor
    offset: Tensor | None

    def repeated(self, times: int) -> Turn:
        """Return the turn with every entry of the batch repeated `times` times, as for beams and several answers."""
        ids, seen, mask, column = (x.repeat_interleave(times, 0) for x in self[:4])
        return Turn(ids, seen, mask, column, None if self.offset is None else self.offset.repeat_interleave(times, 0))

    def whole_mask(self, mask: Tensor) -> Tensor:
        """Convert an attention mask of the caller's prompt and later tokens to one of the shortened prompt."""
        return torch.cat([self.mask.to(mask), mask[:, self.ids.shape[1] :]], 1)

    def continued(self, inputs: Inputs, held: int, places: list[int]) -> Inputs:
        """Convert inputs of `generate` that begin with this prompt, for a cache of `held` tokens with this prompt.

        Args:
            inputs: Inputs with `input_ids [B, L + n]`, without pixels.
            held: Tokens of the cache.
            places: Ids of placeholders of visual tokens.

        Raises:
            ValueError: The inputs begin with another prompt, or contain a new video.
        """
        ids: Tensor = inputs["input_ids"]
        L = self.ids.shape[1]
        if held < self.seen.shape[1]:
            raise ValueError(
                f"{cache_in(inputs)[0]}: expected all {self.seen.shape[1]} tokens of the prompt with its videos, got a "
                f"cache that was cut to {held}"
            )
        begins = ids.shape[0] == self.ids.shape[0] and ids.shape[1] > L
        if not (begins and torch.equal(ids[:, :L], self.ids.to(ids))):
            raise ValueError(
                f"input_ids: expected the {list(self.ids.shape)} tokens whose videos the cache holds, and what follows "
                f"them, got {list(ids.shape)} that begin otherwise"
            )
        if bool(torch.isin(ids[:, L:], ids.new_tensor(places)).any()):
            raise ValueError(
                f"{cache_in(inputs)[0]}: expected an empty cache with a new video, got one of {held} tokens; "
                "vmemory.VideoSession takes frames in one after the other"
            )
        new = {**inputs, "input_ids": torch.cat([self.seen.to(ids), ids[:, L:]], 1)}
        given = inputs.get("attention_mask")
        mask = self.whole_mask(torch.ones_like(ids) if given is None else given)
        new["attention_mask"] = mask
        for name in ("mm_token_type_ids", "token_type_ids"):
            if inputs.get(name) is not None:
                rest = inputs[name][:, L:]
                new[name] = torch.cat([rest.new_zeros(self.seen.shape), rest], 1)
        if inputs.get("position_ids") is not None:
            # positions of the prompt are not needed any more
            rest = inputs["position_ids"][..., L:]
            new["position_ids"] = torch.cat([rest.new_zeros(*rest.shape[:-1], self.seen.shape[1]), rest], -1)
        elif self.offset is not None:
            new["position_ids"] = self.positions(mask)
        return new

    def following(self, inputs: Inputs, held: int) -> Inputs:
        """Convert inputs of `forward` with `n` tokens for such a cache; the mask may be one of the caller's prompt.

        Args:
            inputs: Inputs with `input_ids [B, n]`.
            held: Tokens of the cache.
        """
        ids: Tensor | None = inputs.get("input_ids")
        given = inputs.get("attention_mask")
        if ids is None or (given is not None and given.dim() != 2):
            return inputs
        new, n = dict(inputs), ids.shape[1]
        longer = self.ids.shape[1] - self.seen.shape[1]
        if given is not None and longer and given.shape[1] == held + longer + n:
            new["attention_mask"] = given = self.whole_mask(given)
        if self.offset is not None and inputs.get("position_ids") is None:
            if given is None:
                given = torch.cat([self.mask, self.mask.new_ones(len(ids), held + n - self.mask.shape[1])], 1)
            new["position_ids"] = self.positions(given)[..., -n:]
        return new

    def positions(self, mask: Tensor) -> Tensor:
        """Return positions `[4, B, L' + n]` for this mask; only those after the prompt are correct."""
        assert self.offset is not None
        text = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return torch.cat([text[None], (text + self.offset.to(text)).expand(3, *text.shape)])


def cache_argument(model: Any) -> str:
    """Return the name of the cache argument of a model's `forward`, which changed in transformers 5.24."""
    inner = getattr(model, "get_base_model", None)
    forward = type(inner() if callable(inner) else model).forward
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def cache_in(mapping: Any) -> tuple[str, Any]:
    """Return name and value of the cache in inputs or outputs, under either name; None if there is none."""
    for name in ("cache", "past_key_values"):
        # newer outputs warn on access by the older name
        if name in mapping.keys() and mapping[name] is not None:  # noqa: SIM118
            return name, mapping[name]
    return "past_key_values", None


def tokens_in(cache: Any) -> int:
    """Return the number of tokens in a cache."""
    return 0 if cache is None else int(cache.get_seq_length())


def mark(cache: Any, turn: Turn) -> None:
    """Mark a cache, and copies of it, with the prompt that it begins with."""
    if cache is not None:
        setattr(cache, _TURN, turn)


def turn_in(cache: Any) -> Turn | None:
    """Return the prompt that a cache begins with, if it is a shortened one."""
    if cache is None or _TURN not in getattr(cache, "__dict__", {}):
        return None
    if tokens_in(cache) == 0:
        delattr(cache, _TURN)
        return None
    turn: Turn = getattr(cache, _TURN)
    return turn
