from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

import vmemory
from vmemory import _cpu, info
from vmemory.ops import _native, _select, grid_pool, similarity_topk
from vmemory.ops._native import NativeStatus

ALL = tuple(_cpu.LEVELS)


def load(monkeypatch, tmp_path, facts: dict | None, libraries: Iterable[str] = (), runs: int = 3) -> NativeStatus:
    """What the loader makes of a package folder with these files, on a machine that runs so many levels."""
    if facts is not None:
        (tmp_path / "_build.json").write_text(json.dumps(facts))
    for name in libraries:
        (tmp_path / name).write_bytes(b"not a library")
    monkeypatch.setattr(_native, "_PACKAGE", tmp_path)
    monkeypatch.setattr(_cpu, "machine_levels", lambda: ALL[:runs])
    return _native._load()


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """Names of the libraries that the loader asks for; each seems to load."""
    asked: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", lambda path: asked.append(Path(path).name))
    monkeypatch.delenv(_cpu.VARIABLE, raising=False)
    return asked


def named(*levels: str) -> list[str]:
    return [f"_ops.{level}.so" for level in levels]


def test_reports_this_installation():
    report = info.collect()
    assert report["torch"] == torch.__version__
    assert set(report["backends"]) == {"cpu", "cuda", "triton", "host"}
    for state in report["backends"].values():
        # whatever is not there says why
        assert state["loaded"] == (not state["reason"])


def test_prints_json(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["info", "--json"])
    info.main()
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(info.collect()))


def test_prints_words(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["info"])
    info.main()
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out
    for name in ("cpu", "cuda", "triton", "host"):
        assert f"\n  {name}" in out


def test_says_why_the_build_made_no_library(monkeypatch, tmp_path, loads):
    reasons = {"cpu": "no C++ compiler at build time", "cuda": "VMEMORY_CUDA=0 at build time"}
    status = load(monkeypatch, tmp_path, {"cpu": False, "reasons": reasons})
    assert (status.cpu, status.cuda, status.level) == (False, False, "")
    assert {"cpu": status.cpu_reason, "cuda": status.cuda_reason} == reasons


def test_says_when_the_package_was_never_built(monkeypatch, tmp_path, loads):
    status = load(monkeypatch, tmp_path, None)
    assert not status.cpu
    assert "install the package with pip" in status.cpu_reason


@pytest.mark.skipif(not _cpu.machine_levels(), reason="this machine runs no level")
def test_says_when_the_library_does_not_load(monkeypatch, tmp_path):
    monkeypatch.delenv(_cpu.VARIABLE, raising=False)
    status = load(monkeypatch, tmp_path, {}, named("x86-64-v2"))
    assert not status.cpu
    assert status.cpu_reason.startswith("_ops.x86-64-v2.so did not load: ")
    assert status.cuda_reason == status.cpu_reason


@pytest.mark.parametrize(
    ("built", "runs", "level"),
    [
        (ALL, 3, "x86-64-v4"),
        (ALL, 2, "x86-64-v3"),
        (ALL, 1, "x86-64-v2"),
        (ALL[:1], 3, "x86-64-v2"),
        (ALL[::2], 2, "x86-64-v2"),
    ],
)
def test_loads_the_best_level_that_is_built_and_runs(monkeypatch, tmp_path, loads, built, runs, level):
    status = load(monkeypatch, tmp_path, {}, named(*built), runs)
    assert (status.cpu, status.level, loads) == (True, level, named(level))
    assert status.level_reason.startswith("the best for this CPU")


def test_refuses_libraries_for_better_cpus(monkeypatch, tmp_path, loads):
    status = load(monkeypatch, tmp_path, {}, named(*ALL[1:]), runs=1)
    assert (status.cpu, loads) == (False, [])
    assert status.cpu_reason == (
        "_ops was built for x86-64-v3, x86-64-v4, this CPU runs x86-64-v2: reinstall on this machine"
    )


def test_below_the_lowest_level_the_reference_runs(monkeypatch, tmp_path, loads):
    monkeypatch.setattr(_cpu, "_flags", lambda: {"pni", "ssse3", "cx16", "lahf_lm"})
    status = load(monkeypatch, tmp_path, {}, named(*ALL), runs=0)
    assert (status.cpu, loads) == (False, [])
    assert status.cpu_reason == ("this CPU is below x86-64-v2: /proc/cpuinfo shows no popcnt, sse4_1, sse4_2")


@pytest.mark.parametrize(
    ("forced", "level"),
    [("x86-64-v2", "x86-64-v2"), ("x86-64-v2;x86-64-v3", "x86-64-v3"), ("all", "x86-64-v4"), ("native", "x86-64-v4")],
)
def test_a_variable_forces_a_level(monkeypatch, tmp_path, loads, forced, level):
    monkeypatch.setenv(_cpu.VARIABLE, forced)
    status = load(monkeypatch, tmp_path, {}, named(*ALL))
    assert (status.level, loads, status.level_reason) == (level, named(level), f"VMEMORY_CPU_ARCH={forced}")


@pytest.mark.parametrize(
    ("forced", "built", "runs", "words"),
    [
        ("x86-64-v4", ALL, 2, "VMEMORY_CPU_ARCH=x86-64-v4 cannot be had: _ops was built for .*v4, this CPU runs .*v3$"),
        ("x86-64-v3", ALL[:1], 3, "VMEMORY_CPU_ARCH=x86-64-v3 cannot be had: _ops was built for x86-64-v2, this CPU"),
        ("x86-64-v2", (), 3, "VMEMORY_CPU_ARCH=x86-64-v2 cannot be had: no compiler"),
    ],
)
def test_a_forced_level_that_cannot_be_had_is_an_error(monkeypatch, tmp_path, loads, forced, built, runs, words):
    monkeypatch.setenv(_cpu.VARIABLE, forced)
    with pytest.raises(RuntimeError, match=words):
        load(monkeypatch, tmp_path, {"reasons": {"cpu": "no compiler"}}, named(*built), runs)
    assert loads == []


@pytest.mark.parametrize("value", ["v3", "x86-64-v5", "x86-64-v2,x86-64-v3", "all;native"])
def test_a_variable_that_names_no_level_is_an_error(monkeypatch, tmp_path, loads, value):
    monkeypatch.setenv(_cpu.VARIABLE, value)
    with pytest.raises(ValueError, match=f"VMEMORY_CPU_ARCH: expected native, all or .*, got '{value}'"):
        load(monkeypatch, tmp_path, {}, named(*ALL))


def test_levels_follow_the_flags(monkeypatch):
    flags: set[str] = set()
    monkeypatch.setattr(_cpu, "_flags", lambda: flags)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for n, needs in enumerate(_cpu.LEVELS.values()):
        for flag in sorted(needs):
            assert _cpu.machine_levels() == ALL[:n], flag
            flags.add(flag)
    assert _cpu.machine_levels() == ALL
    # a machine that hides a flag of a lower level has no higher one
    flags.remove("popcnt")
    assert _cpu.machine_levels() == ()


def test_other_machines_have_one_portable_build(monkeypatch, tmp_path, loads):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert _cpu.machine_levels() == ("portable",)
    assert _cpu.wanted_levels("all") == _cpu.wanted_levels("native") == ("portable",)
    (tmp_path / "_ops.portable.so").touch()
    monkeypatch.setattr(_native, "_PACKAGE", tmp_path)
    assert (_native._load().level, loads) == ("portable", ["_ops.portable.so"])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="glibc tells levels of x86-64 only")
def test_levels_are_those_that_glibc_finds():
    loader = Path("/lib64/ld-linux-x86-64.so.2")
    told = subprocess.run([loader, "--help"], capture_output=True, text=True, check=False) if loader.exists() else None
    if told is None or "x86-64-v2" not in told.stdout:
        pytest.skip("this glibc does not tell levels")
    assert set(re.findall(r"(x86-64-v[234]) \(supported", told.stdout)) == set(_cpu.machine_levels())


@pytest.mark.parametrize("reason", ["no nvcc at build time", "VMEMORY_CUDA=0 at build time"])
def test_says_why_cuda_is_missing(monkeypatch, tmp_path, loads, reason):
    status = load(monkeypatch, tmp_path, {"cuda": False, "reasons": {"cuda": reason}}, named("x86-64-v2"))
    assert (status.cpu, status.cuda, status.cuda_reason) == (True, False, reason)


def test_says_when_cuda_was_built_but_torch_sees_no_device(monkeypatch, tmp_path, loads):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status = load(monkeypatch, tmp_path, {"cuda": True}, named("x86-64-v2"))
    assert status.cuda_reason == "built, but torch sees no CUDA device"
    assert loads == named("x86-64-v2")


@pytest.mark.parametrize(
    ("toolkit", "driver", "shown"),
    [
        ("13.0", 13000, ""),
        ("12.4", 13010, ""),
        ("12.8", 12020, "12.2"),
        ("13.0", 12090, "12.9"),
        ("13.0", 0, "0.0"),
    ],
)
def test_cuda_kernels_need_a_driver_of_the_toolkits_day(monkeypatch, tmp_path, loads, toolkit, driver, shown):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_native, "_driver", lambda: driver)
    status = load(monkeypatch, tmp_path, {"cuda": True, "cuda_toolkit": toolkit}, named("x86-64-v2"))
    assert status.cpu
    assert status.cuda == (not shown)
    assert ("_ops_cuda.so" in loads) == status.cuda
    words = f"the driver serves CUDA {shown}, the kernels were built with {toolkit}: update the driver, or rebuild"
    assert status.cuda_reason == (words if shown else "")
    if shown:
        monkeypatch.setattr(_select, "STATUS", status)
        monkeypatch.setattr(_select, "HAS_TRITON", True)
        assert similarity_topk.backends.why_not("native", "cuda", torch.float32) == words
        assert similarity_topk.backends.why_not("triton", "cuda", torch.float32) == ""


def test_an_implementation_that_cannot_run_is_refused_with_its_reason():
    x = torch.ones(1, 4, 4, 8)
    with pytest.raises(RuntimeError, match=r"grid_pool: impl='triton' cannot run: Triton kernels run on CUDA devices"):
        grid_pool(x, 2, impl="triton")
    with pytest.raises(ValueError, match="impl: expected 'auto'"):
        grid_pool(x, 2, impl="fast")


def test_explain_gives_a_reason_for_each_other_implementation():
    said = vmemory.explain(grid_pool, torch.ones(1, 4, 4, 8), 2)
    assert said.op == "grid_pool"
    assert all(said.rejected.values())
    assert str(said).startswith(f"grid_pool: {said.impl}\n  not ")


def test_explain_refuses_what_it_cannot_answer():
    with pytest.raises(TypeError, match="op: expected one of vmemory's ops"):
        vmemory.explain(torch.relu, torch.ones(1))
    with pytest.raises(TypeError, match="args: expected at least one tensor"):
        vmemory.explain(grid_pool, 3)
