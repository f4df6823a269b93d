"""Insert code and docstrings into pages.

`<!-- code: examples/x.py -->` becomes that file, and `<!-- public: vmemory/ops -->` the docstrings of all public names
of the package, module by module, functions before the types that they return.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ASKED = re.compile(r"<!-- (public|code): (.+?) -->")


def names(package: str) -> list[str]:
    """Return the dotted names that a package's `__init__` imports and lists in `__all__`."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    listed: set[str] = set()
    imported: list[tuple[str, list[str]]] = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            imported.append((node.module, [alias.name for alias in node.names]))
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            listed = set(ast.literal_eval(node.value))
    order = [(module, sorted(given, key=lambda name: name[0].isupper())) for module, given in imported]
    return [f"{module}.{name}" for module, given in order for name in given if name in listed]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the comments of a page; mkdocs calls this for each page."""

    def taken(asked: re.Match[str]) -> str:
        if asked[1] == "code":
            return f"```python\n{(ROOT / asked[2]).read_text()}```"
        return "\n\n".join(f"::: {name}" for name in names(asked[2]))

    return ASKED.sub(taken, markdown)
