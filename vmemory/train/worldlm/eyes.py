"""The vision tower learns what single pictures show, before any language."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmemory.data.world import COLOURS, NUMBERS, PLACES, SHAPES, World
from vmemory.train.worldlm.labels import NOTHING, ORDER, THINGS, TILE_CLASSES, Labels, joined, labels_of
from vmemory.train.worldlm.model import CELLS, MERGE, frame_rows

_SPARE = 33  # channels of the patch embedding that ridge regression fills


class Heads(nn.Module):
    """Linear readers of tiles and cells; they are thrown away when the tower has learned."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.tiles = nn.Linear(dim, TILE_CLASSES)
        self.cells = nn.ModuleDict({name: nn.Linear(dim, nothing + 1) for name, nothing in NOTHING.items()})
        self.place = nn.Linear(dim, len(PLACES))
        self.position = nn.Linear(dim, 16)


def pictures(first: int, worlds: int, each: int, split: str = "train") -> tuple[Tensor, Labels]:
    """Draw `each` pictures of several worlds, and their labels."""
    shown, labels = [], []
    for seed in range(first, first + worlds):
        world = World(seed, 200, split=split)
        seconds = np.sort(np.random.RandomState(seed).permutation(200)[:each])
        shown.append(torch.from_numpy(world.render(seconds)))
        labels.append(labels_of(world, seconds))
    return torch.cat(shown), joined(labels)


@torch.no_grad()
def fit_patches(tower: Any, worlds: int, seed: int = 0) -> None:
    """Fill channels of the patch embedding by ridge regression: colour, shape, number and place of a tile add up.

    A linear layer that is trained by gradients on free pictures takes many times as long to find the shapes.
    """
    shown, labels = pictures(seed, worlds, 16)
    rows = frame_rows(shown)[0]
    tile = labels.tiles.flatten()
    draw = torch.Generator().manual_seed(seed)
    keep = (tile < THINGS + len(NUMBERS)) | (torch.rand(len(tile), generator=draw) < 0.12)
    rows, tile = rows[keep], tile[keep]
    card, number = tile < THINGS, (tile >= THINGS) & (tile < THINGS + len(NUMBERS))
    target = torch.cat(
        [
            F.one_hot((tile // len(SHAPES)).clamp(max=len(COLOURS) - 1), len(COLOURS)) * card[:, None],
            F.one_hot(tile % len(SHAPES), len(SHAPES)) * card[:, None],
            F.one_hot((tile - THINGS).clamp(0, len(NUMBERS) - 1), len(NUMBERS)) * number[:, None],
            F.one_hot((tile - THINGS - len(NUMBERS)).clamp(min=0), len(PLACES)) * ~(card | number)[:, None],
            _phases(labels)[keep] * ~(card | number)[:, None],
        ],
        1,
    ).float()
    known = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    share = torch.bincount(tile, minlength=TILE_CLASSES).clamp(min=1).float()
    weight = (1 / share)[tile]
    weighted = known * (weight / weight.mean())[:, None]
    square = weighted.T @ known + 2e-3 * len(rows) * torch.eye(known.shape[1])
    found = torch.linalg.solve(square, weighted.T @ target)
    embedding = tower.embeddings.patch_embedding
    embedding.weight[:_SPARE] = 4 * found[:-1].T.reshape(_SPARE, *embedding.weight.shape[1:])
    embedding.bias[:_SPARE] = 4 * found[-1]
    embedding.weight[_SPARE:] *= 0.5
    # at first the layers pass on what the embedding says
    for layer in tower.encoder.layers:
        for last in (layer.self_attn.out_proj, layer.mlp.fc2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)


def _phases(labels: Labels) -> Tensor:
    """Compute sine and cosine of the background's two waves at the centre of each tile `[16 n, 4]`."""
    row, column = ORDER // 4, ORDER % 4
    across = (16 * column + 8) / 7 + 2 * labels.place[:, :1]
    down = ((16 * row + 8) / 9).expand_as(across)
    return torch.stack([across.sin(), across.cos(), down.sin(), down.cos()], -1).flatten(0, 1)


def encoded(tower: Any, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Run the tower on pictures; returns cells `[n, 4, C]`, and tiles `[n, 16, C]` before they are merged."""
    rows, grid = frame_rows(shown)
    seen: list[Tensor] = []
    hook = tower.post_layernorm.register_forward_hook(lambda module, given, out: seen.append(out))
    try:
        out = tower(rows, torch.tensor([grid]), torch.tensor([MERGE])).last_hidden_state
    finally:
        hook.remove()
    return out.reshape(len(shown), CELLS, -1), seen[0].reshape(len(shown), 16, -1)


def loss_of(heads: Heads, cells: Tensor, tiles: Tensor, labels: Labels) -> Tensor:
    """Sum the losses of tiles and cells; empty ones count little, for there are many."""
    weight = torch.ones(TILE_CLASSES)
    weight[THINGS + len(NUMBERS) :] = 0.1
    loss = 3 * F.cross_entropy(heads.tiles(tiles).flatten(0, 1), labels.tiles.flatten(), weight)
    loss = loss + F.cross_entropy(heads.place(cells).flatten(0, 1), labels.place.flatten())
    position = F.cross_entropy(heads.position(tiles).flatten(0, 1), ORDER.repeat(len(tiles)), reduction="none")
    weight = torch.where(labels.tiles.flatten() < THINGS, 4.0, 1.0)
    loss = loss + (position * weight).sum() / weight.sum()
    for name, head in heads.cells.items():
        weight = torch.ones(NOTHING[name] + 1)
        weight[-1] = 0.15
        loss = loss + F.cross_entropy(head(cells).flatten(0, 1), getattr(labels, name).flatten(), weight)
    return loss


def train_tower(tower: Any, steps: int, seed: int = 0) -> dict[str, float]:
    """Train the tower on drawn pictures, and return how much of those of other worlds it reads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = Heads(tower.config.hidden_size)
    groups = [{"params": list(tower.parameters()), "lr": 1e-3}, {"params": list(heads.parameters()), "lr": 6e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.02, betas=(0.9, 0.98))
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [1e-3, 6e-3], total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    for step in range(steps):
        shown, labels = pictures(seed + 1000 + 16 * step, 16, 8)
        loss = loss_of(heads, *encoded(tower, shown), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        rates.step()
    return read_share(tower, heads)


@torch.no_grad()
def read_share(tower: Any, heads: Heads) -> dict[str, float]:
    """Measure how much of what the validation split's pictures show is read right, nothing not counted."""
    shown, labels = pictures(0, 16, 16, "validation")
    cells, tiles = encoded(tower, shown)
    there = labels.tiles < THINGS + len(NUMBERS)
    share = {"tiles": _share(heads.tiles(tiles), labels.tiles, there)}
    share["position"] = _share(heads.position(tiles), ORDER.expand_as(labels.tiles), labels.tiles < THINGS)
    share["background"] = _share(heads.position(tiles), ORDER.expand_as(labels.tiles), ~there)
    share["place"] = _share(heads.place(cells), labels.place, labels.place >= 0)
    for name, head in heads.cells.items():
        label = getattr(labels, name)
        share[name] = _share(head(cells), label, label < NOTHING[name])
    return share


def _share(scores: Tensor, label: Tensor, where: Tensor) -> float:
    return float((scores.argmax(-1) == label)[where].float().mean())
