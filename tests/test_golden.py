"""Each recording of an original, and this package's answer to the same input (`tests/recordings.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from tests.recordings import CHECKS, Case, cases, folder, policies

pytestmark = pytest.mark.golden


def parameters() -> Iterator[object]:
    for policy, recorded, checked in policies(folder()):
        if checked and recorded:
            yield from (pytest.param(policy, case, id=str(case)) for case in recorded)
        else:
            why = "no recordings of it" if checked else f"nothing checks its {len(recorded)} recordings"
            yield pytest.param(policy, None, id=policy, marks=pytest.mark.skip(reason=f"{policy}: {why}"))


@pytest.mark.parametrize(("policy", "case"), list(parameters()))
def test_decides_and_returns_as_the_original(policy: str, case: Case) -> None:
    import_module(f"tests.golden_cases.{policy}").check(case)


def test_cases_are_found_by_their_files(tmp_path: Path) -> None:
    files = ("a_new_one/case.json", "a_new_one/README.md", "tome/b.json", "tome/b.safetensors", "tome/a.safetensors")
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    found = {policy: ([str(case) for case in recorded], checked) for policy, recorded, checked in policies(tmp_path)}
    assert found["a_new_one"] == (["a_new_one/case"], False)
    assert found["tome"] == (["tome/a", "tome/b"], True)
    assert found["vlm2"] == ([], True)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMEMORY_GOLDEN", str(tmp_path / "gone"))
    with pytest.raises(pytest.UsageError, match="VMEMORY_GOLDEN: expected a folder, got"):
        folder()


def test_every_check_has_a_recording_in_the_repository() -> None:
    """A check that no recording reaches would rot."""
    here = Path(__file__).parent / "golden"
    assert [file.stem for file in sorted(CHECKS.glob("*.py")) if not cases(here / file.stem)] == []
