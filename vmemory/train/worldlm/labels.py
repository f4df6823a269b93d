"""Labels of tiles and cells of pictures, to learn from."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vmemory.data.world import COLOURS, NUMBERS, PLACES, SHAPES, World

THINGS = len(COLOURS) * len(SHAPES)
# a card, a number or the place behind an empty tile
TILE_CLASSES = THINGS + len(NUMBERS) + len(PLACES)
# tiles in the order of the tower's tokens: four of a cell behind each other
ORDER = torch.arange(16).reshape(2, 2, 2, 2).transpose(1, 2).flatten()
_PLACES_FROM = THINGS + len(NUMBERS)
# what the parts of a picture are labelled with, and the label for nothing
NOTHING = {"colour": len(COLOURS), "shape": len(SHAPES), "number": len(NUMBERS), "tile": 16}


class Labels(NamedTuple):
    """Labels of `n` pictures.

    Attributes:
        tiles: `[n, 16]` classes, four of a cell behind each other.
        colour, shape, number: `[n, 4]` of what each cell shows, `NOTHING` where it shows none.
        place: `[n, 4]`, the same for all cells of a picture.
        tile: `[n, 4]`, the tile of a cell's card.
    """

    tiles: Tensor
    colour: Tensor
    shape: Tensor
    number: Tensor
    place: Tensor
    tile: Tensor


def labels_of(world: World, seconds: np.ndarray) -> Labels:
    """Label the pictures of some seconds."""
    n = len(seconds)
    place = world.place[seconds]
    tiles = np.repeat((_PLACES_FROM + place)[:, None], 16, 1)
    cells = {name: np.full((n, 4), nothing) for name, nothing in NOTHING.items()}
    for i, second in enumerate(seconds.tolist()):
        for half in (0, 1):
            shown = int(world.card[second, half])
            if shown >= 0:
                card, tile = world.cards[shown], int(world.tile[second, half])
                tiles[i, tile] = card.colour * len(SHAPES) + card.shape
                cell = cell_of(tile)
                for name, value in (("colour", card.colour), ("shape", card.shape), ("tile", tile)):
                    cells[name][i, cell] = value
        number = int(world.number[second])
        if number >= 0:
            tile = int(world.number_tile[second])
            tiles[i, tile] = THINGS + world.numbers[number].value
            cells["number"][i, cell_of(tile)] = world.numbers[number].value
    ordered = tiles.reshape(n, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(n, 16)
    made = {name: torch.from_numpy(values) for name, values in cells.items()}
    places = torch.from_numpy(np.repeat(place[:, None], 4, 1))
    return Labels(torch.from_numpy(ordered.copy()), place=places, **made)


def cell_of(tile: Any) -> Any:
    """Return the cell, 0 … 3, of a tile or of an array of them."""
    return tile // 8 * 2 + tile % 4 // 2


def joined(parts: list[Labels]) -> Labels:
    """Put labels of several worlds behind each other."""
    return Labels(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
