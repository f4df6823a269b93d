from __future__ import annotations

import ast
import inspect
import re
import sys
from functools import cache
from graphlib import TopologicalSorter
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import vmemory
from vmemory.testing import python

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vmemory"
# what a part of the package may import directly; what those may import, it may too
BELOW = {
    "_cpu": set(),
    "_files": set(),
    "kernels": set(),
    "reference": set(),
    "_ptx": set(),
    "testing": {"reference", "_ptx"},
    "ops": {"kernels", "reference", "_cpu"},
    "_host": set(),
    "banks": {"ops", "_files", "_host"},
    "compress": {"ops"},
    "encoders": {"ops", "_files"},
    "graph": {"encoders", "banks"},
    "sources": set(),
    "search": {"banks", "sources"},
    "models": {"banks"},
    "kv": {"models"},
    "integrations": {"models", "compress"},
    "_attach": {"integrations"},
    "session": {"_attach", "sources"},
    "data": {"_attach", "sources", "_files"},
    "train": {"data", "session"},
    "eval": {"data", "encoders", "search", "session"},
    "info": {"ops", "_host", "vmemory"},
    "cli": {"eval", "train", "graph", "info"},
}
# the package's own __init__ gives names to everything
BELOW["vmemory"] = set(BELOW) - {"cli"}


@cache
def modules() -> dict[str, Path]:
    """Dotted name to file, symlinked folders included."""
    found = {}
    for folder in (PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir()), *linked()):
        for path in folder.glob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def linked() -> list[Path]:
    return [PACKAGE / name for name in ("kernels", "integrations")]


def imports(name: str) -> set[str]:
    """The modules of the package that a module imports, anywhere in its file."""
    known, out = modules(), set()
    for node in ast.walk(ast.parse(known[name].read_text())):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names if alias.name.split(".")[0] == "vmemory"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import in line {node.lineno}"
            if node.module and node.module.split(".")[0] == "vmemory":
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                out |= {n if n in known or n == "vmemory._host" else node.module for n in full}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            out |= {n.value for n in node.args if isinstance(n, ast.Constant) and str(n.value).startswith("vmemory.")}
    return out - {name}


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else "vmemory"


def allowed(name: str) -> set[str]:
    todo, out = [name], {name}
    while todo:
        for below in BELOW[todo.pop()]:
            if below not in out:
                out.add(below)
                todo += [below] if below != "vmemory" else []
    return out


def test_every_part_of_the_package_has_its_place():
    assert {part(name) for name in modules()} <= set(BELOW)


def test_nothing_imports_upward():
    wrong = []
    for name in modules():
        wrong += [f"{name} -> {other}" for other in imports(name) if part(other) not in allowed(part(name))]
    assert not wrong


def test_no_two_files_import_each_other():
    list(TopologicalSorter({name: imports(name) for name in modules()}).static_order())


@pytest.mark.parametrize("name", ["kernels", "integrations"])
def test_folders_at_the_root_are_linked_and_have_no_init(name):
    link = PACKAGE / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert not (ROOT / name / "__init__.py").exists()


def test_torch_headers_are_named_in_one_file():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
    assert sources
    naming = [path for path in sources if re.search(r"#include <(torch|ATen|c10)/", path.read_text())]
    assert naming == [ROOT / "csrc/torch/stable.h"]


def test_native_code_keeps_to_the_macros_of_torch_2_11():
    """The oldest torch that is built against; newer headers have more of them, and would not complain."""
    sources = [path.read_text() for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".txt"]
    named = {name for source in sources for name in re.findall(r"\b\w*TORCH_\w+\b", source)}
    called = {name for name in named if not name.startswith(("TORCH_STABLE_ONLY", "TORCH_TARGET_VERSION"))}
    assert called <= {
        "STABLE_TORCH_LIBRARY_IMPL", "STD_TORCH_CHECK", "TORCH_ABI_VERSION", "TORCH_BOX", "TORCH_ERROR_CODE_CHECK"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "own"),
    [
        ("common", "common/"),
        ("contracts", "contracts/|torch/"),
        ("cpu", "common/|contracts/|torch/"),
        ("host", "common/|host/"),
        ("simt", "simt/|torch/"),
    ],
)
def test_native_includes_go_one_way(folder, own):
    for path in (ROOT / "csrc" / folder).iterdir():
        for include in re.findall(r'#include "([^"]+)"', path.read_text()):
            assert re.match(own, include) or include == "facts.inc", f"{path.name} includes {include}"


def test_kernels_know_triton_and_torch_only():
    known = {"triton", "torch", *sys.stdlib_module_names}
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            strangers = [n for n in names if n.split(".")[0] not in known and not n.startswith("vmemory.kernels")]
            assert not strangers, f"{path.name}: {strangers}"


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_imports_from_the_project_root():
    # a top-level package called kernels would be taken for Hugging Face's
    out = python(
        f"import os; os.chdir({str(ROOT)!r}); import sys; sys.path.insert(0, '')\n"
        "import transformers, vmemory.kernels\n"
        "from transformers import CLIPConfig, CLIPModel\n"
        "print(CLIPConfig.model_type)"
    )
    assert out.split()[-1] == "clip"


def test_import_needs_neither_triton_nor_transformers():
    out = python(
        "import sys; sys.modules['triton'] = sys.modules['transformers'] = None\n"
        "import vmemory, torch; print(tuple(vmemory.ops.grid_pool(torch.ones(1, 4, 4, 8), 2).shape))"
    )
    assert out.strip() == "(1, 2, 2, 8)"


def test_the_package_imports_its_names_when_they_are_asked_for():
    out = python(
        "import sys; sys.modules['torch'] = None\n"
        "import vmemory; print(vmemory.__version__, 'VideoSession' in dir(vmemory))\n"
        "del sys.modules['torch']\n"
        "print(all(getattr(vmemory, name) is not None for name in vmemory.__all__))"
    )
    assert out.split()[-2:] == ["True", "True"]
    assert "eval" not in vmemory.__all__, "a star import would hide Python's own"


def test_the_tensors_of_a_state_are_named_alike_in_state_and_memory():
    # type checkers do not see registered buffers
    for memory in (vmemory.banks.Bank, vmemory.banks.DualMemory):
        fields = inspect.signature(memory.snapshot).return_annotation
        state = vars(import_module(memory.__module__))[fields]
        assert [name for name in memory.__annotations__ if name in state._fields] == list(state._fields)


def public() -> dict[str, object]:
    """What users name: `vmemory.__all__`, the names of the packages in it, and the base of model families."""
    named = {name: getattr(vmemory, name) for name in vmemory.__all__}
    for name in ("banks", "compress", "kv", "ops", "search", "session", "sources"):
        named |= {
            f"{name}.{key}": value for key, value in vars(import_module(f"vmemory.{name}")).items() if key[0] != "_"
        }
    named["Adapter"] = import_module("vmemory.models.adapter").Adapter
    return {name: o for name, o in named.items() if callable(o) and o.__module__.startswith("vmemory.")}


def signatures(name: str, thing: object):
    if not inspect.isclass(thing):
        yield name, inspect.signature(thing)
        return
    for key in dir(thing):
        found = inspect.getattr_static(thing, key)
        found = getattr(found, "fget", None) or getattr(found, "__func__", found)
        mine = inspect.isfunction(found) and found.__module__.startswith("vmemory.")
        if mine and (key == "__init__" or key[0] != "_"):
            yield f"{name}.{key}", inspect.signature(found)


def test_no_public_signature_says_any():
    # the modules inside a model differ between releases of transformers
    vague = {"Adapter.feature_module"}
    passed_on = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    seen = 0
    for name, signature in (pair for one in public().items() for pair in signatures(*one)):
        types = [p.annotation for p in signature.parameters.values() if p.kind not in passed_on]
        # plain values of a JSON file
        said = [str(kind).replace("[str, Any]", "") for kind in (*types, signature.return_annotation)]
        assert name in vague or not any(re.search(r"\bAny\b", kind) for kind in said), f"{name}: {said}"
        seen += 1
    assert seen > 100
