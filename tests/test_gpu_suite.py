"""What a first call on a GPU does with its nine minutes, told without one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks import gpu_suite


def test_what_is_worth_most_fits_nine_minutes():
    left, begun = 9 * 60.0, []
    parts = list(gpu_suite.SECONDS)
    for index, part in enumerate(parts):
        share = gpu_suite.time_of(parts[index:], left)
        left -= share
        if share >= gpu_suite.LEAST:
            begun.append(part)
        assert left >= 0
    assert begun == ["build", "tests", "families"]


def test_time_that_a_part_leaves_goes_to_those_after_it():
    # after a quick build and quick tests
    parts = list(gpu_suite.SECONDS)
    assert gpu_suite.time_of(parts[2:], 400.0) == gpu_suite.SECONDS["families"]
    assert gpu_suite.time_of(parts[3:], 175.0) == gpu_suite.SECONDS["sanitizer"]
    # the last part takes all
    assert gpu_suite.time_of(parts[-1:], 700.0) == 700.0


def test_a_long_call_leaves_no_part_out():
    left, parts = 60 * 60.0, list(gpu_suite.SECONDS)
    for index, part in enumerate(parts):
        share = gpu_suite.time_of(parts[index:], left)
        assert share >= gpu_suite.SECONDS[part]
        left -= share
    assert left == pytest.approx(0)


def test_every_command_names_cases_that_exist(tmp_path):
    commands = gpu_suite.timings("families", tmp_path)
    cases = [word for command in commands.values() for word in command if "::" in word]
    assert len(commands) == 5
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *cases]
    done = subprocess.run(collect, cwd=gpu_suite.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(cases)} tests collected" in done.stdout


def test_the_plan_needs_no_device(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--plan", "--out", str(tmp_path / "out")]
    told = subprocess.run(command, cwd=gpu_suite.ROOT, capture_output=True, text=True, check=True).stdout
    parts = [line for line in told.splitlines() if not line.startswith(" ")]
    assert [line.split(":")[0] for line in parts] == list(gpu_suite.SECONDS)
    assert [line.endswith("no time left") for line in parts] == [False] * 3 + [True] * 4
    assert not (tmp_path / "out").exists()
