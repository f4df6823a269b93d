from __future__ import annotations

import json
import sys

import pytest
import torch

import vmemory
from vmemory import info
from vmemory.ops import _native, grid_pool
from vmemory.ops._native import NativeStatus


def load(monkeypatch, tmp_path, facts: dict | None, library: bytes | None) -> NativeStatus:
    """What the loader makes of a package folder with these files."""
    if facts is not None:
        (tmp_path / "_build.json").write_text(json.dumps(facts))
    if library is not None:
        (tmp_path / "_ops.so").write_bytes(library)
    monkeypatch.setattr(_native, "_PACKAGE", tmp_path)
    return _native._load()


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


@pytest.mark.parametrize(
    "reason",
    ["no C++ compiler at build time", "torch was not installed at build time", "VMEMORY_NATIVE=0 at build time"],
)
def test_says_why_the_build_made_no_library(monkeypatch, tmp_path, reason):
    status = load(monkeypatch, tmp_path, {"cpu": False, "reasons": {"cpu": reason, "cuda": reason}}, None)
    assert (status.cpu, status.cuda, status.cpu_reason, status.cuda_reason) == (False, False, reason, reason)


def test_says_when_the_package_was_never_built(monkeypatch, tmp_path):
    status = load(monkeypatch, tmp_path, None, None)
    assert not status.cpu
    assert "install the package with pip" in status.cpu_reason


def test_says_when_the_library_does_not_load(monkeypatch, tmp_path):
    status = load(monkeypatch, tmp_path, {"cpu": True}, b"not a library")
    assert not status.cpu
    assert status.cpu_reason.startswith("_ops.so did not load: ")
    assert status.cuda_reason == status.cpu_reason


def test_refuses_a_library_for_a_better_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    status = load(monkeypatch, tmp_path, {"cpu": True, "cpu_arch": "x86-64-v4"}, b"never loaded")
    assert status.cpu_reason == "_ops.so was built for x86-64-v4, this CPU offers AVX2: reinstall on this machine"


@pytest.mark.parametrize("reason", ["no nvcc at build time", "VMEMORY_CUDA=0 at build time"])
def test_says_why_cuda_is_missing(monkeypatch, tmp_path, reason):
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    status = load(monkeypatch, tmp_path, {"cpu": True, "cuda": False, "reasons": {"cuda": reason}}, b"stands in")
    assert (status.cpu, status.cuda, status.cuda_reason) == (True, False, reason)


def test_says_when_cuda_was_built_but_torch_sees_no_device(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status = load(monkeypatch, tmp_path, {"cpu": True, "cuda": True}, b"stands in")
    assert status.cuda_reason == "built, but torch sees no CUDA device"


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
