"""Time the quantisation of rows to 8 or 4 bits per value, and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.cases import Case
from vmemory.ops import dequantize_slots, quantize_slots
from vmemory.reference import quantize_slots as reference

ROWS, CHANNELS = 64 * 196, 3584


def _quantize(bits: int, dtype: torch.dtype = torch.float32) -> Case:
    name = f"to int{bits} from {str(dtype).removeprefix('torch.')}"
    return Case(
        name, lambda _: (ROWS, CHANNELS), lambda x: tuple(quantize_slots(x, bits)),
        lambda x: reference.quantize_slots(x, bits), bits / 8 / dtype.itemsize, 3.0, dtype=dtype,
    )  # fmt: skip


def _dequantize(bits: int, dtype: torch.dtype = torch.float32) -> Case:
    """Return a case whose rows are bytes viewed as float32, because the harness makes float32 inputs."""

    def stored(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.detach().float().contiguous().view(torch.int8 if bits == 8 else torch.uint8), x.new_ones(
            x.shape[0]
        ).float()

    width = CHANNELS * bits // 8 // 4
    name = f"from int{bits} to {str(dtype).removeprefix('torch.')}"
    return Case(
        name, lambda _: (ROWS, width), lambda x: dequantize_slots(*stored(x), dtype=dtype),
        lambda x: reference.dequantize_slots(*stored(x), None, CHANNELS, dtype), dtype.itemsize * 8 / bits, 1.0,
    )  # fmt: skip


QUANTIZE = [
    _quantize(8), _quantize(8, torch.bfloat16), _quantize(4), _quantize(4, torch.bfloat16),
    _dequantize(8), _dequantize(8, torch.bfloat16), _dequantize(4), _dequantize(4, torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize("case", QUANTIZE, ids=lambda case: case.name)
@pytest.mark.benchmark(group="quantize_slots")
def test_quantize_slots(case, race):
    race(case)
