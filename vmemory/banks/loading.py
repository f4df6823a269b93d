"""Make a memory again from a file, or from the parts that a file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmemory.banks.dual.memory import DualMemory
from vmemory.banks.io import BankFile, BankFileError
from vmemory.banks.memory import Memory
from vmemory.banks.quantization import dtype_of
from vmemory.banks.registry import build_memory


def load(path: str | Path, device: torch.device | str = "cpu") -> tuple[Memory, BankFile]:
    """Return the memory that `save` wrote, of the class its policy names, and the file's other contents.

    Sizes are compared with the file's own before anything is allocated, and what lists and counters say before any
    operator follows them.

    Raises:
        BankFileError: The file cannot be used; one line says why.
    """
    file = BankFile.read(Path(path))
    try:
        weights = DualMemory.weights_of(file.extra) if file.policy == DualMemory.policy else {}
        return restored(file.policy, file.config, file.state, device, weights), file
    except ValueError as error:
        # whole, and of this version, but not what `save` writes
        raise BankFileError(f"{path}: {error}") from None


def restored(
    policy: str,
    config: dict[str, Any],
    state: dict[str, Tensor],
    device: torch.device | str = "cpu",
    weights: dict[str, Tensor] | None = None,
) -> Memory:
    """Return the memory with this policy, this `to_dict()` and this state, and of a dual memory with these weights.

    Raises:
        ValueError: They are not what a memory says of itself, or do not fit each other; nothing has been allocated.
    """
    if not isinstance(config.get("dtype"), str):
        raise ValueError(f"config: expected the name of a dtype, got {config.get('dtype')!r}")
    arguments = {**config, "dtype": dtype_of(config["dtype"])}
    if "device" in config or "policy" in config:
        raise ValueError("config: expected arguments of the memory alone, got device or policy")
    try:
        # has sizes and no memory; what does not fit int64 is a RuntimeError
        probe = build_memory(policy, device="meta", **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"config: {str(error).splitlines()[0]}") from None
    if probe.to_dict() != config:
        raise ValueError(f"config: expected {probe.to_dict()}, got {config}")
    if set(state) != set(probe.state._fields):
        raise ValueError(f"state: expected {', '.join(probe.state._fields)}, got {', '.join(sorted(state))}")
    held = type(probe.state)(**state)
    probe.check(held)
    if isinstance(probe, DualMemory):
        probe.check_weights(weights or {})
    memory = build_memory(policy, device=device, **arguments)
    if isinstance(memory, DualMemory):
        memory.load_state_dict(weights or {})
    memory.restore(held)
    return memory
