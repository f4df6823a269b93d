"""The page of families and policies is what the contract's tests wrote, and it is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests import matrix
from tests.attach_oracle import MIXES, RECURRENT
from tests.tiny_vlms import FAMILIES
from vmemory.banks import POLICIES

PAGE = Path(__file__).parents[1] / "docs/families.md"


def tables(page: str) -> list[dict[str, list[str]]]:
    """The page's tables: first cell -> the others, the header under "family"."""
    found: list[dict[str, list[str]]] = [{}]
    for line in page.splitlines():
        cells = [cell.replace("`", "").strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and not line.startswith("|---"):
            found[-1][cells[0]] = cells[1:]
        elif found[-1] and not line.startswith("|"):
            found.append({})
    return [table for table in found if table]


def test_the_page_has_every_family_and_every_policy():
    policies, families = tables(PAGE.read_text())
    assert sorted(name for names in policies.pop("family") for name in names.split(", ")) == sorted(POLICIES)
    assert list(policies) == list(FAMILIES)
    assert families.pop("family") == list(matrix.PER_FAMILY.values())
    assert list(families) == list(FAMILIES)


def test_the_page_tells_of_no_failure():
    policies, families = tables(PAGE.read_text())
    for family in FAMILIES:
        for names, cell in zip(policies["family"], policies[family], strict=True):
            for policy in names.split(", "):
                masked = "–¹" if policy in MIXES else "–²" if family in RECURRENT else "M"
                assert cell == f"B {masked} G L D"
        assert set(families[family]) == {"passed"}
