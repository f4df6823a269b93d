"""Code in the guides runs, on a tiny model; what pages take from elsewhere is there."""

from __future__ import annotations

import re
import runpy
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import vmemory

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
GUIDES, REFERENCE = (ROOT / "docs").glob("*.md"), (ROOT / "docs/reference").glob("*.md")
PAGES = {path.relative_to(ROOT / "docs").with_suffix("").as_posix(): path.read_text() for path in (*GUIDES, *REFERENCE)}
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
WITH_CODE = [name for name, text in PAGES.items() if BLOCK.search(text)]

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def hooks():
    return runpy.run_path(str(ROOT / "docs/hooks.py"))


@pytest.fixture
def given(monkeypatch, tmp_path):
    """What the guides take for granted: a model, its processor, a film and a prompt about it."""
    from vmemory.models import registry

    # all that is known before the guides add to it
    import_module("vmemory._attach")._load_families()
    monkeypatch.setattr(registry, "_BY_TYPE", dict(registry._BY_TYPE))
    monkeypatch.setattr(registry, "_BY_METHODS", list(registry._BY_METHODS))
    monkeypatch.chdir(tmp_path)
    shared = runpy.run_path(str(ROOT / "examples/shared.py"))
    frames = shared["film"](None)
    model, processor = shared["load"](None)
    inputs = shared["prompt"](processor, frames, "What happened?")
    return {
        "torch": torch, "vmemory": vmemory, "model": model, "processor": processor, "frames": frames, "inputs": inputs,
    }  # fmt: skip


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, given, capsys):
    if "peft" in PAGES[page]:
        pytest.importorskip("peft")
    if page == "tuning":
        pytest.importorskip("optuna")
    for code in BLOCK.findall(PAGES[page]):
        exec(compile(code, f"docs/{page}.md", "exec"), given)
    assert vmemory.attached(given["model"]) is None


def test_guides_have_code():
    assert {"index", "memories", "models", "streaming", "training", "porting", "compressors", "cache"} <= set(WITH_CODE)


def test_pages_show_the_examples_as_they_are(hooks):
    assert (ROOT / "examples/custom_policy.py").read_text() in hooks["on_page_markdown"](PAGES["write-a-policy"])
    assert (ROOT / "examples/custom_family.py").read_text() in hooks["on_page_markdown"](PAGES["write-a-family"])


def test_the_first_program_of_readme_runs(capsys):
    code = BLOCK.findall((ROOT / "README.md").read_text())[0]
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("torch.Size([")


def test_readme_is_read_in_three_minutes():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    pages = ["\n".join(lines), *PAGES.values()]
    tables = [line for page in pages for line in page.splitlines() if line.startswith("|")]
    wide = [line for line in tables if line.replace("\\|", "").count("|") > 6]
    assert not wide, "tables have at most five columns"


def test_every_operator_and_compressor_is_in_the_reference(hooks):
    for package, module in (("vmemory/ops", vmemory.ops), ("vmemory/compress", vmemory.compress)):
        named = [name.rsplit(".", 1) for name in hooks["names"](package)]
        assert {name for _, name in named} == set(module.__all__)
        assert all(getattr(sys.modules[where], name) is getattr(module, name) for where, name in named)


def test_every_policy_and_every_family_is_told_of():
    from vmemory.models.registry import supported_types

    assert all(cls.__name__ in PAGES["memories"] for cls in vmemory.banks.POLICIES.values())
    import_module("vmemory._attach")._load_families()
    assert all(f"`{kind}`" in PAGES["models"] for kind in supported_types())
