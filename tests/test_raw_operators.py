"""Whatever is handed to a raw operator, it returns or raises: no crash, no hang, nothing half changed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.raw_operators import KNOWN, OPS, recorded
from vmemory.ops._native import STATUS

pytestmark = pytest.mark.skipif(not STATUS.cpu, reason=STATUS.cpu_reason)
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """How each hostile call ended, by its name; fails with the name of the one that ended the process."""
    log = tmp_path_factory.mktemp("raw") / "calls"
    command = [sys.executable, "-m", "tests.raw_operators", str(log), *(["--unlimited"] if SANITIZED else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        # a sanitizer says first what it found, and then where, over many lines
        code, told = done.returncode, done.stderr[:1500] + "\n...\n" + done.stderr[1500:][-1500:]
    except subprocess.TimeoutExpired:
        code, told = "no end", ""
    lines = [line.split("\t") for line in log.read_text().splitlines()] if log.exists() else []
    assert code == 0, f"{code} in {lines[-1][0] if lines else 'the good calls'}\n{told}"
    return dict(lines)


def test_good_calls_reach_every_operator():
    calls = recorded()
    assert set(calls) == set(OPS)
    assert not [name for name, made in calls.items() if not made]


def test_no_hostile_call_ends_the_process(ends):
    assert len({name.split(":")[0] for name in ends}) == len(OPS)
    assert len(ends) > 50 * len(OPS)


def test_refused_calls_change_nothing(ends):
    assert not [name for name, end in ends.items() if "AFTER A CHANGE" in end]


# numbers that stay what they are: large counts, rows that name no stream, slot or segment; and lists of a state, which
# would cost too much to look through, are clamped where they are followed
HARMLESS = {
    "ring_push_: count 4611686018427387904",
    "ring_read: count 4611686018427387904",
    "ring_read: count 9223372036854775807",
    "slot_replace_: count 4611686018427387904",
    "similarity_topk: a large count",
    "select_tokens: a segment that is not there",
    "dequantize_slots: a row that is not there",
    "memory_attention: a large count",
    "bank_push_: seen 4611686018427387904",
    "bank_push_: a stream that is not there",
    *(f"bank_push_: order {n}" for n in (-1, 7, 10**6, 2**40)),
    "bank_gather: slots that are not there",
    "bank_gather: frames that are not there",
    "bank_gather: frames of a deeper tier",
    "bank_gather_backward: slots that are not there",
}


def test_known_crashes_are_refused_or_harmless(ends):
    assert {name for name in KNOWN if ends[name] == "ran"} == HARMLESS


def test_refusals_name_the_argument_what_was_expected_and_what_came(ends):
    assert ends["grid_pool: size []"].endswith("vmemory: size: expected height and width, got 0 numbers")
    wanted = "vmemory: frames: expected shape [2, *, 3, 8], got [2, 3, 300, 80]"
    assert ends["ring_push_: wide frames"].endswith(wanted)
    assert ends["bipartite_match: no group"].endswith("vmemory: groups: expected 1 to 2147483647, got 0")
