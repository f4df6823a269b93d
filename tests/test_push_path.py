"""Pushes and attached forwards stay short: few Python calls in few files."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import vmemory
from tests.test_banks import STORES, clip, make
from vmemory import banks

ROOT = Path(banks.__file__).parents[2]
PACKAGES = str(ROOT / "vmemory"), str(ROOT / "integrations")


class Calls:
    """The files of the package's own functions that are called within the block, in order."""

    def __enter__(self) -> list[str]:
        self.files: list[str] = []
        sys.setprofile(self._note)
        return self.files

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        # Python 3.12 and later call no function for a comprehension
        if event == "call" and code.co_filename.startswith(PACKAGES) and not code.co_name.endswith(("comp>", "expr>")):
            self.files.append(code.co_filename)

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("policy", STORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "int8", "int4"])
def test_a_push_takes_at_most_30_calls_in_10_files(policy: str, dtype: torch.dtype | str) -> None:
    bank, frames = make(policy, dtype=dtype), clip(20)
    frames = frames.to(dtype) if isinstance(dtype, torch.dtype) else frames
    bank.push(frames[:19], [float(t) for t in range(19)])
    with Calls() as files:
        bank.push(frames[19:], 19.0)
    assert 0 < len(files) <= 30
    assert len(set(files)) <= 10


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("policy", ["merging", "episodic"])
@pytest.mark.parametrize("keep", ["evicted", "frames"])
def test_a_push_with_an_archive_takes_at_most_66_calls_in_14_files(policy: str, keep: str) -> None:
    bank, frames = make(policy), clip(20)
    bank.archive = banks.Archive("1MiB", keep=keep)
    bank.push(frames[:19], [float(t) for t in range(19)])
    with Calls() as files:
        bank.push(frames[19:], 19.0)
    assert 0 < len(files) <= 66
    assert len(set(files)) <= 14


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("family", ["video_llama_3", "qwen2_5_vl", "llava_onevision"])
def test_an_attached_forward_takes_at_most_48_calls_in_17_files(family: str) -> None:
    pytest.importorskip("transformers")
    from tests.tiny_vlms import tiny

    model, inputs = tiny(family)
    with vmemory.attach(model, "merging", {"memory_capacities": 4}), torch.no_grad():
        model(**inputs)
        with Calls() as files:
            model(**inputs)
    assert 0 < len(files) <= 48
    assert len(set(files)) <= 17


@pytest.mark.parametrize("policy", sorted(banks.POLICIES))
def test_a_policy_has_at_most_two_of_our_classes_above_it(policy: str) -> None:
    above = banks.POLICIES[policy].__mro__[1:]
    assert sum(cls.__module__.startswith("vmemory.") for cls in above) <= 2
