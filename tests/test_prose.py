"""First lines of docstrings say in the imperative what a function does (PEP 257)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("vmemory", "kernels", "integrations", "benchmarks", "examples", "docs")
FILES = ("setup.py",)
# add a verb here if a docstring needs it
VERBS = set(
    """
    accept add advance allocate answer append apply ask assert assign attach attend begin bind blend build call
    catch check clean clear close collect combine commit compile compress compute concatenate condense configure
    connect continue convert copy count create crop cut decide decode delete dequantise describe detach disable
    discard display divide do download draw drop embed enable encode end ensure enter erase estimate evaluate evict
    expand explain export extend extract fail feed fill find finish fit flatten flush fold follow forget fork format
    forward free freeze gather get handle hold ignore import include index infer initialise insert inspect install
    interpret iterate join keep label launch learn let limit list listen load localise lock log look lower make map
    mark mask match measure merge move name normalise notify observe open order pack parse pass patch pause pick
    place plot pool prepare prepend preserve print process project propagate provide pull push put quantise queue
    quote raise rank read recall receive record reduce refer refresh refuse register reject release remember remove
    rename render renumber repeat replace replay report request require reset reshape resize resolve restore resume
    return reuse rewrite round run sample save scale scan schedule score seal search see select send serve set settle
    shift show shrink skip sort split spread start state stop store stream strike subtract sum swap switch synchronise
    take
    tell test time tokenise track train transform trim try turn undo uninstall unpack update use validate verify
    visit wait wake warn watch widen wrap write yield zero
    """.split()  # noqa: SIM905  one a line would take a page
)
# questions and pronouns instead of the thing itself
VAGUE = {"what", "which", "how", "where", "when", "it", "these", "those", "this", "that", "everything"}


def docstrings(path: Path) -> Iterator[tuple[int, ast.AST, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), node, text.splitlines()[0]


def describes(node: ast.AST) -> bool:
    """A module, class or property is a thing, which a noun names."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return True
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def wrong(path: Path) -> list[str]:
    out = []
    for line, node, first in docstrings(path):
        word = first.split()[0].strip(",:;.").lower()
        if word in VAGUE or not (describes(node) or word in VERBS):
            out.append(f"{path.relative_to(ROOT)}:{line}: {first}")
    return out


def python_files() -> list[Path]:
    return [*(ROOT / name for name in FILES), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]


def test_first_lines_are_imperative():
    assert not [line for path in python_files() for line in wrong(path)]


@pytest.mark.parametrize(
    ("source", "accepted"),
    [
        ('def f():\n    """Return the slot."""', True),
        ('def f():\n    """The slot that leaves."""', False),
        ('class A:\n    """The slot that leaves."""', True),
        ('class A:\n    """What leaves."""', False),
        ('@property\ndef f(self):\n    """The slot that leaves."""', True),
    ],
)
def test_nouns_name_things_and_verbs_name_functions(source, accepted, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "module.py"
    path.write_text(source)
    assert (not wrong(path)) == accepted
