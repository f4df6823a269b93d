"""The `tempme_*` options: the documented command lines, defaults, and what a wrong one says."""

from __future__ import annotations

from argparse import ArgumentError, ArgumentParser, Namespace
from types import SimpleNamespace

import pytest

from tests.clip_models import OpenAICLIP
from vmemory.compress import (
    AdaptiveFrameResampler,
    FrameResampler,
    FrameSelector,
    TempMe,
    add_tempme_arguments,
    tempme_from_arguments,
)


def parsed(line: str) -> Namespace:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--datatype")
    add_tempme_arguments(parser)
    return parser.parse_args(line.split())


def test_simple():
    made = tempme_from_arguments(
        parsed("--use_tempme True --tempme_type simple --tempme_compression_ratio 0.6 --datatype msrvtt")
    )
    assert isinstance(made, FrameSelector)
    assert (made.compression_ratio, made.count(20), made.encoder.layers[-1].out_features) == (0.6, 12, 256)
    exact = tempme_from_arguments(parsed("--use_tempme --tempme_output_frames 12 --tempme_hidden_dim 64"))
    assert (exact.count(100), exact.encoder.layers[-1].out_features) == (12, 64)


def test_basic():
    made = tempme_from_arguments(
        parsed(
            "--use_tempme True --tempme_type basic --tempme_input_frames 32 --tempme_output_frames 12 "
            "--tempme_num_layers 2 --tempme_hidden_dim 64"
        )
    )
    assert isinstance(made, FrameResampler)
    assert (made.frames, made.count(32), len(made.layers), made.queries.shape[1]) == (32, 12, 2, 64)


def test_adaptive():
    made = tempme_from_arguments(
        parsed(
            "--use_tempme True --tempme_type adaptive --tempme_max_input_frames 48 --tempme_min_output_frames 8 "
            "--tempme_max_output_frames 16 --tempme_hidden_dim 64"
        )
    )
    assert isinstance(made, AdaptiveFrameResampler)
    assert (made.frames, made.min_output_frames, made.count(48), len(made.layers)) == (48, 8, 16, 3)


def test_merge():
    clip = OpenAICLIP(layers=12, patch=2)
    made = tempme_from_arguments(parsed("--use_tempme --tempme_type merge"), clip)
    assert isinstance(made, TempMe)
    assert made.schedule == TempMe(clip).schedule
    other = tempme_from_arguments(
        parsed(
            "--use_tempme --tempme_type merge --tempme_input_frames 6 --tempme_merge_layer 3-7 "
            "--tempme_merge_frame_num 2-3 --tempme_tome_r 3 --tempme_merge_token_proportion 40-20"
        ),
        clip,
    )
    wanted = TempMe(clip, 6, merge_layers=(3, 7), merge_frames=(2, 3), r=3, proportions=(40, 20))
    assert other.schedule == wanted.schedule
    with pytest.raises(ValueError, match="model: expected a CLIP model to merge in"):
        tempme_from_arguments(parsed("--use_tempme --tempme_type merge"))


@pytest.mark.parametrize("line", ["", "--use_tempme False", "--use_tempme 0 --tempme_type basic"])
def test_off(line):
    assert tempme_from_arguments(parsed(line)) is None


def test_any_object_with_attributes():
    assert tempme_from_arguments(object()) is None
    assert isinstance(tempme_from_arguments(SimpleNamespace(use_tempme=True)), FrameSelector)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--tempme_type basic --tempme_compression_ratio 0.5",
            "tempme_compression_ratio: expected with .* simple, got",
        ),
        ("--tempme_num_layers 2", "tempme_num_layers: expected with tempme_type basic or adaptive, got 'simple'"),
        ("--tempme_compression_ratio 1.5", r"compression_ratio: expected a number in .* got 1.5"),
        ("--tempme_type basic --tempme_hidden_dim 12", "hidden_dim: expected a multiple of num_heads"),
    ],
)
def test_bad_options(line, message):
    with pytest.raises(ValueError, match=message):
        tempme_from_arguments(parsed(f"--use_tempme {line}"))


def test_bad_type():
    with pytest.raises(ValueError, match="tempme_type: expected one of simple, basic, adaptive, merge, got 'fast'"):
        tempme_from_arguments(SimpleNamespace(use_tempme=True, tempme_type="fast"))


def test_neither_true_nor_false():
    with pytest.raises(ArgumentError, match="expected True or False, got 'maybe'"):
        parsed("--use_tempme maybe")
