"""What pages take from elsewhere, so that it stands in one place.

`<!-- README: Memories -->` becomes what is under that heading of README, `<!-- code: examples/x.py -->` that file, and
`<!-- public: vmemory/ops -->` the docstrings of all that the package gives names to, module by module, functions before
what they return.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ASKED = re.compile(r"<!-- (README|public|code): (.+?) -->")
# files outside docs/ are no pages of the site
OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|docs/|#)[^)]+\)")


def section(heading: str) -> str:
    """What stands in README between `## heading` and the next of that rank, with links as seen from docs/.

    Raises:
        ValueError: README has no such heading.
    """
    readme = (ROOT / "README.md").read_text()
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", readme, re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError(f"README.md: expected a heading '## {heading}', which a page of docs/ takes over")
    return OUTSIDE.sub(r"\1", found[1]).replace("](docs/", "](").strip()


def names(package: str) -> list[str]:
    """Dotted names of all that a package's `__init__` imports and lists in `__all__`."""
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
    """Called by mkdocs for each page."""

    def taken(asked: re.Match[str]) -> str:
        if asked[1] == "README":
            return section(asked[2])
        if asked[1] == "code":
            return f"```python\n{(ROOT / asked[2]).read_text()}```"
        return "\n\n".join(f"::: {name}" for name in names(asked[2]))

    return ASKED.sub(taken, markdown)
