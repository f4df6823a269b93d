"""The page of families and policies is what the contract's tests wrote, and it is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests import matrix, test_attach, test_session, test_session_words
from tests.attach_oracle import MIXES, RECURRENT
from tests.tiny_vlms import FAMILIES
from vmemory.banks import POLICIES

PAGE = Path(__file__).parents[1] / "docs/families.md"


def tables(page: str) -> list[dict[str, list[str]]]:
    """The page's tables: first cell -> the others, the header under "family"."""
    found: list[dict[str, list[str]]] = [{}]
    for line in page.splitlines():
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        if line.startswith("|") and not line.startswith("|---"):
            found[-1][cells[0]] = cells[1:]
        elif found[-1] and not line.startswith("|"):
            found.append({})
    return [table for table in found if table]


def test_the_page_has_every_family_and_every_policy():
    policies, families = tables(PAGE.read_text())
    assert policies.pop("family") == list(POLICIES)
    assert list(policies) == list(FAMILIES)
    assert families.pop("family") == list(matrix.PER_FAMILY.values())
    assert list(families) == list(FAMILIES)


def test_the_page_tells_of_no_failure():
    policies, families = tables(PAGE.read_text())
    for family in FAMILIES:
        for policy, cell in zip(POLICIES, policies[family], strict=True):
            masked = "–¹" if policy in MIXES else "–²" if family in RECURRENT else "M"
            assert cell == f"B {masked} G L D"
        assert set(families[family]) == {"passed"}


def test_every_check_is_a_test():
    for name in matrix.PAIRED:
        assert callable(getattr(test_attach, name))
    for name in matrix.PER_FAMILY:
        assert any(hasattr(module, name) for module in (test_attach, test_session, test_session_words))


def test_failures_and_gaps_are_told():
    name, (letter, _) = next(iter(matrix.PAIRED.items()))
    outcomes = {(name, "llava", "merging"): "failed", (name, "llava", "recent"): "passed"}
    policies, families = tables(matrix.page(outcomes))
    llava = dict(zip(POLICIES, policies["llava"], strict=True))
    assert llava["merging"].startswith(f"**{letter} failed** –¹ **G not run**")
    assert llava["recent"].startswith(f"{letter} **M not run**")
    assert set(families["llava"]) == {"not run"}


@pytest.mark.parametrize(
    ("phases", "ended"),
    [
        ([("setup", "passed"), ("call", "passed"), ("teardown", "passed")], "passed"),
        ([("setup", "passed"), ("call", "failed"), ("teardown", "passed")], "failed"),
        ([("setup", "passed"), ("call", "passed"), ("teardown", "failed")], "failed"),
        ([("setup", "skipped"), ("teardown", "passed")], "skipped"),
        ([("setup", "failed"), ("teardown", "passed")], "failed"),
    ],
)
def test_a_test_ends_as_its_worst_phase(tmp_path, phases, ended):
    name = next(iter(matrix.PAIRED))
    table = matrix.MatrixTable(tmp_path / "page.md")
    for phase, outcome in phases:
        nodeid = f"tests/test_attach.py::{name}[llava-recent]"
        table.pytest_runtest_logreport(pytest.TestReport(nodeid, ("", 0, ""), {}, outcome, None, phase))
    assert table.outcomes == {(name, "llava", "recent"): ended}
