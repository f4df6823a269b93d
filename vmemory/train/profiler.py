"""Peaks of memory, of the process and of the device, step by step."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

_log = logging.getLogger(__name__)
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class StepMemory(NamedTuple):
    """A step: its number, its seconds, and the peaks of memory in bytes (`device_peak` is 0 without a device)."""

    step: int
    seconds: float
    host_peak: int
    device_peak: int


class MemoryProfiler(TrainerCallback):
    """Measures the peak of memory in each step of a training, or of a part of a program.

    As a callback of transformers' `Trainer` it measures each optimizer step. As a context manager it measures its
    block; `step()` ends a step within.

    The host's peak is the process's resident memory, which holds everything: model, data, libraries. Linux counts it,
    and the count is set back at the start of each step. Where the system does not permit this, a warning tells so, and
    the peaks are those since the process began.

    Attributes:
        steps: `StepMemory` of each step.
    """

    def __init__(self) -> None:
        self.steps: list[StepMemory] = []
        self._started: float | None = None
        self._resets = True

    @property
    def host_peak(self) -> int:
        """Bytes of resident memory at the peak of all steps."""
        return max((step.host_peak for step in self.steps), default=0)

    @property
    def device_peak(self) -> int:
        """Bytes of tensors on the device at the peak of all steps, 0 without a device."""
        return max((step.device_peak for step in self.steps), default=0)

    def start(self) -> None:
        """Begin a step."""
        if self._resets:
            try:
                # the kernel's command to set the peak of resident memory back
                _RESET.write_text("5")
            except OSError as error:
                self._resets = False
                _log.warning("MemoryProfiler: peaks of the host are those since the process began (%s)", error)
        if torch.accelerator.is_available():
            torch.accelerator.reset_peak_memory_stats()
        self._started = time.perf_counter()

    def step(self) -> StepMemory:
        """End a step and begin the next one.

        Raises:
            RuntimeError: No step was begun.
        """
        if self._started is None:
            raise RuntimeError("MemoryProfiler: expected a step that was begun (with, or start), got none")
        device = 0
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
            device = torch.accelerator.max_memory_allocated()
        seconds = time.perf_counter() - self._started
        self.steps.append(StepMemory(len(self.steps) + 1, seconds, _host_peak(), device))
        self.start()
        return self.steps[-1]

    def __enter__(self) -> MemoryProfiler:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.step()
        self._started = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin an optimizer step of the `Trainer`."""
        self.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End it."""
        self.step()


def _host_peak() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
