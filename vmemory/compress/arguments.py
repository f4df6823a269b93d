"""Add `tempme_*` options to the command line of a training script, and build the compressor they describe."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from torch import nn

from vmemory.compress.adaptive import AdaptiveFrameResampler
from vmemory.compress.resampler import FrameResampler
from vmemory.compress.selector import FrameSelector
from vmemory.compress.tempme import TempMe

# for each type: option name without `tempme_` -> constructor argument
_SAME = {name: name for name in ("hidden_dim", "num_layers", "input_frames", "output_frames")}
_TYPES: dict[str, tuple[Callable[..., nn.Module], dict[str, str]]] = {
    "simple": (
        FrameSelector,
        {"compression_ratio": "compression_ratio", "hidden_dim": "hidden_dim", "output_frames": "output_frames"},
    ),
    "basic": (FrameResampler, _SAME),
    "adaptive": (
        AdaptiveFrameResampler,
        {
            "hidden_dim": "hidden_dim",
            "num_layers": "num_layers",
            "max_input_frames": "max_input_frames",
            "min_output_frames": "min_output_frames",
            "max_output_frames": "max_output_frames",
        },
    ),
    "merge": (
        TempMe,
        {
            "input_frames": "frames",
            "merge_layer": "merge_layers",
            "merge_frame_num": "merge_frames",
            "tome_r": "r",
            "merge_token_proportion": "proportions",
        },
    ),
}
_KINDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "compression_ratio": (float, "share of the frames kept (simple)"),
    "hidden_dim": (int, "width of the compressor (simple, basic, adaptive)"),
    "num_layers": (int, "layers of its transformer (basic, adaptive)"),
    "input_frames": (int, "most frames of a video (basic); frames of every video (merge)"),
    "output_frames": (int, "frames that come out (basic); exactly so many instead of a ratio (simple)"),
    "max_input_frames": (int, "most frames of a video (adaptive)"),
    "min_output_frames": (int, "fewest frames that come out (adaptive)"),
    "max_output_frames": (int, "most frames that come out (adaptive)"),
    "merge_layer": (str, "layers that join neighbouring clips, as in 8-9-10 (merge)"),
    "merge_frame_num": (str, "how many clips each of them joins, as in 2-2-3 (merge)"),
    "tome_r": (int, "tokens merged in each layer before (merge)"),
    "merge_token_proportion": (str, "per cent merged across and within clips, as in 30-10 (merge)"),
}


def _truth(text: str) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return known[text.lower()]


def add_tempme_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--use_tempme`, `--tempme_type` and one option per parameter of each type to an argument parser.

    Args:
        parser: Parser of a training script such as CLIP4Clip's or STOP's. `--use_tempme` alone means True. An option
            that is not given is None, and its parameter then keeps the default of the compressor class.

    Source: the TempMe and STOP integration (there `--use_tempme False` was true); TempMe's own script for the options
    of `merge`.
    """
    group = parser.add_argument_group("TempMe", "compression of videos before or inside the vision tower")
    group.add_argument("--use_tempme", type=_truth, nargs="?", const=True, default=False, metavar="BOOL")
    group.add_argument("--tempme_type", choices=list(_TYPES), default="simple")
    for name, (kind, about) in _KINDS.items():
        group.add_argument(f"--tempme_{name}", type=kind, default=None, help=about, metavar=kind.__name__.upper())


def tempme_from_arguments(arguments: object, model: nn.Module | None = None) -> nn.Module | None:
    """Build the compressor that parsed options describe.

    Args:
        arguments: An `argparse.Namespace`, or any object with attributes named like the options of
            `add_tempme_arguments`. A missing attribute counts as None.
        model: A CLIP model that `TempMe` supports; needed by type `merge` only.

    Returns:
        None without `use_tempme`; else by `tempme_type`: "simple" (the default) a `FrameSelector`, "basic" a
        `FrameResampler`, "adaptive" an `AdaptiveFrameResampler`, "merge" a `TempMe` around the tower of `model`.

    Raises:
        TypeError, ValueError: The class refuses a value, the type is unknown or does not have the option, or `merge`
            has no model.
    """
    if not getattr(arguments, "use_tempme", False):
        return None
    kind = getattr(arguments, "tempme_type", None) or "simple"
    if kind not in _TYPES:
        raise ValueError(f"tempme_type: expected one of {', '.join(_TYPES)}, got {kind!r}")
    make, parameters = _TYPES[kind]
    given = {name: getattr(arguments, f"tempme_{name}", None) for name in _KINDS}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in parameters:
            having = [other for other, (_, names) in _TYPES.items() if name in names]
            raise ValueError(f"tempme_{name}: expected with tempme_type {' or '.join(having)}, got {kind!r}")
    chosen = {parameters[name]: value for name, value in given.items()}
    if kind != "merge":
        return make(**chosen)
    if model is None:
        raise ValueError("model: expected a CLIP model to merge in with tempme_type 'merge', got None")
    return make(model, **chosen)
