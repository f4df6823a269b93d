"""ConSE (Norouzi et al. 2013): map images into the space of a sentence encoder, without training."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vmemory._files import cache_dir, replacing
from vmemory.encoders.assets import MINILM
from vmemory.encoders.minilm import SentenceEncoder


class ImageNetClass(NamedTuple):
    """A class of ILSVRC 2012: the words of its WordNet synset, the most common first, and its gloss."""

    words: tuple[str, ...]
    gloss: str

    @property
    def name(self) -> str:
        return self.words[0]


@lru_cache
def imagenet_classes() -> tuple[ImageNetClass, ...]:
    """Return the 1,000 classes in the order of the classifier's logits."""
    table = files("vmemory.encoders").joinpath("imagenet_wordnet.tsv").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in table.splitlines()]
    return tuple(ImageNetClass(tuple(words.split(", ")), gloss) for _, words, gloss in rows)


def class_prompts() -> list[str]:
    """Return the sentence that represents each class: `a photo of a <lemma>`."""
    return [f"a photo of a {', '.join(entry.words)}" for entry in imagenet_classes()]


def class_vectors(encoder: SentenceEncoder | None = None, cache: str | Path | None = None) -> Tensor:
    """Return unit vectors `[1000, 384]` float32 of `class_prompts`, cached on disk.

    Args:
        encoder: sentence encoder for a computation; None loads it if the vectors are not cached.
        cache: cache directory; None takes `$VMEMORY_CACHE` or `~/.cache/vmemory`.
    """
    from safetensors.torch import load_file, save_file

    prompts = class_prompts()
    source = "\n".join([MINILM.files["model.safetensors"], *prompts])
    path = cache_dir(cache) / f"classes-{hashlib.sha256(source.encode()).hexdigest()[:16]}.safetensors"
    if path.exists():
        return load_file(path)["vectors"]
    vectors = (encoder or SentenceEncoder()).encode(prompts)
    with replacing(path) as temporary:
        save_file({"vectors": vectors}, temporary)
    return vectors


def conse_embedding(logits: Tensor, vectors: Tensor, top: int = 10) -> Tensor:
    """Return the mean of class vectors, weighted by the probabilities of the `top` likeliest classes.

    Args:
        logits: `[..., C]`, of frames or of single tokens.
        vectors: `[C, E]` class vectors.
        top: number of classes in the mean (T of the paper's equation 3).

    Returns:
        `[..., E]` float32 of length 1.

    Raises:
        ValueError: the class counts differ, or `top` is not in 1..C.
    """
    if vectors.dim() != 2 or logits.shape[-1] != vectors.shape[0]:
        raise ValueError(
            f"vectors: expected [{logits.shape[-1]}, E] for logits {list(logits.shape)}, got {list(vectors.shape)}"
        )
    if not 1 <= top <= vectors.shape[0]:
        raise ValueError(f"top: expected 1 to {vectors.shape[0]}, got {top}")
    best = logits.float().topk(top, dim=-1)
    # the softmax over the best classes equals the full softmax, normalised over these classes
    weights = best.values.softmax(-1)
    sparse = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
    sparse.scatter_(-1, best.indices, weights)
    return F.normalize(sparse @ vectors.to(sparse), dim=-1)


def center(vectors: Tensor, mean: Tensor | None = None) -> Tensor:
    """Subtract a mean from vectors and scale them to length 1, which shows differences within a stream.

    Args:
        vectors: `[..., E]`.
        mean: `[E]`; None takes the mean of `vectors` over all leading dimensions.
    """
    flat = vectors.reshape(-1, vectors.shape[-1]).float()
    return F.normalize(vectors.float() - (flat.mean(0) if mean is None else mean), dim=-1)
