"""Select the rows of a key-value cache that stay, by a score per row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vmemory.banks.policies.reservoir import hash32
from vmemory.ops import attention_column_sums, select_tokens
from vmemory.ops._checks import check_int

SHARES = ("cache", "layer", "head")


@dataclass
class Rows:
    """The rows of a cache, the new ones last, as the input of a rule.

    Attributes:
        keys, values: `[B, G, n, E]` of each layer.
        queries: `[B, H, N, E]` of each layer, the last queries of the pass with the new rows; empty = not observed.
        token: `[L', B, G', n]` int64, the row's number in the stream; L' and G' are 1 if layers or heads share.
        new: Rows since the last decision.
        seen: Rows of the stream before the new ones.
        whole: Whether the new rows are one span.
    """

    keys: list[Tensor]
    values: list[Tensor]
    queries: list[Tensor]
    token: Tensor
    new: int
    seen: int
    whole: bool

    def shared(self, score: Tensor) -> Tensor:
        """Reduce a score `[L, B, G, n]` to `[L', B, G', n]` by the mean over layers or heads that decide together."""
        layers, _, heads, _ = self.token.shape
        score = score.mean(2, keepdim=True) if heads == 1 else score
        return score.mean(0, keepdim=True) if layers == 1 else score


class RowRule:
    """Keep the rows with the best scores, and always the first and the newest rows.

    Args:
        budget: Rows to keep.
        sinks: First rows of the stream that always stay.
        recent: Share of the other rows that goes to the newest, 0 to 1.
    """

    share = "cache"
    observes = 0

    def __init__(self, budget: int, sinks: int, recent: float = 0.0) -> None:
        if not isinstance(recent, (int, float)) or not 0 <= recent <= 1:
            raise ValueError(f"recent: expected a share between 0 and 1, got {recent!r}")
        if budget <= sinks:
            raise ValueError(f"budget: expected more rows than the {sinks} sinks, got {budget}")
        self.budget, self.sinks = budget, sinks
        self.newest = int((budget - sinks) * recent)

    def check(self, rows: Rows) -> None:
        """Raise ValueError if the new rows do not fit, before anything has changed."""

    def take(self, rows: Rows) -> None:
        """Register the new rows."""

    def score(self, rows: Rows) -> Tensor:
        """Return scores `[L', B, G', n]`; rows with larger scores stay."""
        raise NotImplementedError

    def keep(self, rows: Rows) -> Tensor:
        """Return indices `[L', B, G', n']` int64 of the rows that stay, ascending; n' is at most the budget."""
        n = rows.token.shape[-1]
        if n <= self.budget:
            return torch.arange(n, device=rows.token.device).expand(rows.token.shape)
        # NaN would count as the largest score, but a row that is not finite must leave first
        score = self.score(rows).float().nan_to_num(nan=-torch.inf, posinf=torch.finfo(torch.float32).max)
        score[..., : self.sinks] = torch.inf
        score[..., n - self.newest :] = torch.inf
        return select_tokens(score.flatten(0, 2), self.budget).view(*score.shape[:3], self.budget)

    def move(self, index: Tensor) -> None:
        """Move per-row data by `index`, the result of the last `keep`."""


class Recent(RowRule):
    """Keep the newest rows, and the first: StreamingLLM, arXiv 2309.17453."""

    def score(self, rows: Rows) -> Tensor:
        return rows.token.float()


class Reservoir(RowRule):
    """Keep the newest rows and a fair sample of all others: each row draws a number once, the largest stay.

    The draw depends on `seed` and the row's number alone, not on the chunks of the stream.
    """

    def __init__(self, budget: int, sinks: int, recent: float = 0.5, seed: int = 0) -> None:
        super().__init__(budget, sinks, recent)
        check_int("seed", seed, low=0, high=2**32 - 1)
        self.seed = seed

    def score(self, rows: Rows) -> Tensor:
        # float32 represents 24 bits exactly
        return (hash32(hash32(rows.token + 1) ^ self.seed) >> 8).float()


class KeyDifference(RowRule):
    """Keep rows whose keys differ most from the mean direction of all keys: KeyDiff, arXiv 2504.15364."""

    share = "head"

    def __init__(self, budget: int, sinks: int, recent: float = 0.5) -> None:
        super().__init__(budget, sinks, recent)

    def score(self, rows: Rows) -> Tensor:
        scores = []
        for key in rows.keys:
            unit = torch.nn.functional.normalize(key.float(), dim=-1)
            # one key with a NaN must not make the mean, and thus every score, NaN
            mean = torch.nn.functional.normalize(unit.nan_to_num(0.0).mean(2, keepdim=True), dim=-1)
            scores.append(-(unit * mean).sum(-1))
        return rows.shared(torch.stack(scores))


class Attention(RowRule):
    """Keep rows that recent queries attend to: attention received, halved every `half_life` rows.

    The sum over all queries (`half_life=inf`) is H2O's score (arXiv 2306.14048); the sum over the last queries is
    SnapKV's (arXiv 2404.14469). Each key head decides independently, as in SnapKV.

    Args:
        budget, sinks, recent: As in `RowRule`.
        half_life: Number of rows after which attention counts half.
        window: Number of queries used, the last of each pass.
        by_value: Multiply attention by the norm of the row's value (VATP, arXiv 2406.12335).
    """

    share = "head"

    def __init__(
        self,
        budget: int,
        sinks: int,
        recent: float = 0.7,
        half_life: float = 64.0,
        window: int = 64,
        by_value: bool = False,
    ) -> None:
        super().__init__(budget, sinks, recent)
        if not isinstance(half_life, (int, float)) or not half_life > 0:
            raise ValueError(f"half_life: expected a positive number of rows, got {half_life!r}")
        check_int("window", window, low=1)
        self.half_life, self.observes, self.by_value = half_life, window, by_value
        self.received: Tensor | None = None

    def check(self, rows: Rows) -> None:
        if len(rows.queries) != len(rows.keys):
            raise ValueError(
                f"cache: expected a pass within memory.observing(model), which shows the queries of {len(rows.keys)} "
                f"layers to policies by attention, got {len(rows.queries)}"
            )

    def take(self, rows: Rows) -> None:
        sums = []
        for query, key in zip(rows.queries, rows.keys, strict=True):
            B, H = query.shape[:2]
            G, n = key.shape[1:3]
            each = key.repeat_interleave(H // G, 1).transpose(1, 2)
            received = attention_column_sums(query.transpose(1, 2), each, causal=True, per_head=True)
            sums.append(received.view(B, G, H // G, n).mean(2))
        received = rows.shared(torch.stack(sums))
        if self.received is not None:
            received[..., : -rows.new] += self.received * 0.5 ** (rows.new / self.half_life)
        self.received = received

    def score(self, rows: Rows) -> Tensor:
        assert self.received is not None
        if not self.by_value:
            return self.received
        norms = torch.stack([value.float().norm(dim=-1) for value in rows.values])
        return self.received * rows.shared(norms)

    def move(self, index: Tensor) -> None:
        assert self.received is not None
        self.received = self.received.gather(3, index)
