"""The table of policies, and how a memory is made by a policy's name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from vmemory.banks.memory import Memory

POLICIES: dict[str, type[Memory]] = {}
"""Every policy by name, in alphabetical order; `register_policy` adds to it."""

_Policy = TypeVar("_Policy", bound="type[Memory]")


def register_policy(memory: _Policy) -> _Policy:
    """Add a class of memories to `POLICIES` under the name in its attribute `policy`.

    A class decorator. The name works in `build_memory`, `MemoryConfig`, `attach` and `.vmem` files.

    Raises:
        ValueError: Another class has the name.
    """
    name = memory.policy
    known = POLICIES.get(name)
    if known is not None and known.__qualname__ != memory.__qualname__:
        raise ValueError(f"policy: expected a name that no other memory has, got {name!r} of {known.__qualname__}")
    POLICIES[name] = memory
    return memory


def build_memory(policy: str, **arguments: Any) -> Memory:
    """Return a new memory of a policy, made with the arguments of its class.

    Args:
        policy: A key of `POLICIES`.
        arguments: For example `dim`, `grid`, `capacity` or `budget`, `dtype`.

    Raises:
        ValueError, TypeError: No such policy, or an argument does not fit.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(map(repr, POLICIES))}, got {policy!r}")
    return POLICIES[policy](**arguments)
