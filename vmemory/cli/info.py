"""`vmemory info`: versions, and which backends were built and loaded."""

from __future__ import annotations

import json as json_format
from typing import Annotated

import typer

from vmemory.cli.terminal import Terminal, plain_table
from vmemory.info import collect, in_words


def info(json: Annotated[bool, typer.Option("--json", help="Machine-readable facts.")] = False) -> None:
    """Tell what was built, what loaded, and the reason for anything missing."""
    facts = collect()
    if json:
        Terminal().line(json_format.dumps(facts, indent=1))
        return
    table = plain_table("name", "value", header=False)
    for name in ("vmemory", "python", "torch", "triton", "device"):
        table.add_row(name, str(facts[name] or "none"))
    for name, state in facts["backends"].items():
        table.add_row(f"{name} backend", in_words(state))
    Terminal().print(table)
