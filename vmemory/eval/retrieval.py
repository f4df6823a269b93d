"""Text-video retrieval: video embeddings, similarities with texts, and ranks of the right answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmemory.ops._checks import check_device, check_floating, check_int, check_tensor, shape_of


class Ranking(NamedTuple):
    """Ranks of the right answers over all queries of one direction.

    Attributes:
        recall: Share of the queries with the right answer among the first K, in [0, 1], by K.
        median_rank: Median of the ranks, from 1; between the two middle ones of an even number.
        mean_rank: Mean of the ranks.
        ranks: `[queries]` int64.
    """

    recall: dict[int, float]
    median_rank: float
    mean_rank: float
    ranks: Tensor


class RetrievalResult(NamedTuple):
    """Rankings of both directions: videos for a text, and texts for a video."""

    text_to_video: Ranking
    video_to_text: Ranking


def pool_frames(frames: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return one embedding per video: the mean of its frames' directions.

    Args:
        frames: `[B, T, E]` floating, T at least 1; padding is not read.
        mask: `[B, T]` bool, frames that exist; None = all.

    Returns:
        `[B, E]` float32 (float64 for float64 frames), each frame divided by its norm before; not normalised itself. A
        video without a frame gets zeros. Differentiable.

    Raises:
        TypeError, ValueError: An argument does not fit; the message names it.

    Source: mean pooling of CLIP4Clip (arXiv 2104.08860), as TempMe (arXiv 2409.01156) uses it.
    """
    check_tensor("frames", frames, "[B, T, E]")
    check_floating("frames", frames)
    if frames.shape[1] < 1:
        raise ValueError(f"frames: expected at least 1 frame [B, T, E], got shape {shape_of(frames)}")
    if mask is None:
        return _directions(frames).mean(1)
    check_tensor("mask", mask, "[B, T]")
    if mask.dtype != torch.bool or mask.shape != frames.shape[:2]:
        want = f"bool {shape_of(frames[..., 0])}"
        raise ValueError(f"mask: expected {want}, got {mask.dtype} of shape {shape_of(mask)}")
    check_device("mask", mask, "frames", frames)
    there = mask[..., None]
    return _directions(frames.masked_fill(~there, 0)).sum(1) / there.sum(1).clamp_min(1)


def _directions(x: Tensor) -> Tensor:
    # in float16 the lower bound of the norm, which keeps a row of zeros from NaN, rounds to 0
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class RetrievalHead(nn.Module):
    """Scaled cosines between texts and videos, with a learned temperature.

    Args:
        temperature: The cosines are divided by it at first; CLIP starts at 0.07. Its logarithm is learned.
        max_scale: The cosines are never multiplied by more than this; CLIP's 100.

    Raises:
        TypeError, ValueError: A number that is not positive and finite.

    Source: CLIP (arXiv 2103.00020) section 2.5; CLIP4Clip (arXiv 2104.08860), "meanP".
    """

    def __init__(self, temperature: float = 0.07, max_scale: float = 100.0) -> None:
        super().__init__()
        for name, value in (("temperature", temperature), ("max_scale", max_scale)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a positive number, got {value}")
        self.max_scale = max_scale
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def forward(self, text: Tensor, frames: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return similarities `[Q, B]` of every text with every video, float32 (float64 for float64 frames).

        Args:
            text: `[Q, E]` floating, any norm.
            frames: `[B, T, E]` floating, T at least 1; padding is not read.
            mask: `[B, T]` bool, frames that exist; None = all. A video without one scores 0.

        Raises:
            TypeError, ValueError: An argument does not fit; the message names it.
        """
        check_tensor("text", text, "[Q, E]")
        check_floating("text", text)
        videos, texts = _directions(pool_frames(frames, mask)), _directions(text)
        if texts.shape[1] != videos.shape[1]:
            raise ValueError(f"text: expected [Q, {videos.shape[1]}] to fit frames, got shape {shape_of(text)}")
        check_device("text", text, "frames", frames)
        scale = self.logit_scale.exp().clamp(max=self.max_scale)
        return scale * (texts.to(videos.dtype) @ videos.T)


def retrieval_scores(
    similarity: Tensor, video: Tensor | None = None, ks: Sequence[int] = (1, 5, 10)
) -> RetrievalResult:
    """Compute R@K, median and mean rank of both directions.

    A rank is 1 + the number of answers that score higher, or as high with a lower index. Where several texts describe
    a video, its rank among texts is that of the best of them; videos without a text are not queries.

    Args:
        similarity: `[Q, B]` floating, of every text with every video; Q and B at least 1.
        video: `[Q]` int64, the video each text describes; None = text i describes video i, Q = B.
        ks: The K of R@K, each at least 1.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Unsupported shape, dtype or values, or a NaN in `similarity`.

    Source: the metrics of MSR-VTT retrieval as in CLIP4Clip (arXiv 2104.08860).
    """
    check_tensor("similarity", similarity, "[Q, B]")
    check_floating("similarity", similarity)
    Q, B = similarity.shape
    if not Q or not B or similarity.isnan().any():
        raise ValueError(f"similarity: expected [Q, B] of at least 1 and no NaN, got shape {shape_of(similarity)}")
    for k in ks:
        check_int("ks", k, low=1)
    if video is None:
        if Q != B:
            raise ValueError(f"video: expected [{Q}] int64 where texts and videos differ in number, got None")
        video = torch.arange(Q, device=similarity.device)
    check_tensor("video", video, "[Q]")
    check_device("video", video, "similarity", similarity)
    if video.dtype != torch.int64 or len(video) != Q:
        raise ValueError(f"video: expected int64 [{Q}], got {video.dtype} of shape {shape_of(video)}")
    if video.min() < 0 or video.max() >= B:
        raise ValueError(f"video: expected values from 0 to {B - 1}, got {int(video.min())} to {int(video.max())}")
    place = torch.arange(Q, device=video.device)
    own = similarity.gather(1, video[:, None])[:, 0]
    # of a video's texts the one with the highest score ranks best
    highest = own.new_full((B,), -torch.inf).scatter_reduce(0, video, own, "amax")
    best = place.new_full((B,), Q).scatter_reduce(0, video, place.where(own == highest[video], Q), "amin")
    asked = best < Q
    among_texts = _ranks(similarity.T[asked], best[asked])
    return RetrievalResult(_ranking(_ranks(similarity, video), ks), _ranking(among_texts, ks))


def _ranks(scores: Tensor, right: Tensor) -> Tensor:
    """Return the rank, from 1, of column `right[i]` in row i."""
    own = scores.gather(1, right[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < right[:, None]
    return 1 + ((scores > own) | ((scores == own) & earlier)).sum(1)


def _ranking(ranks: Tensor, ks: Sequence[int]) -> Ranking:
    exact = ranks.double()
    recall = {k: float((ranks <= k).double().mean()) for k in ks}
    return Ranking(recall, float(exact.quantile(0.5)), float(exact.mean()), ranks)
