"""Imports point down, and importing fluxkern does nothing but import."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fluxkern

PACKAGE = Path(fluxkern.__file__).parent
LAYERS = {  # a layer and what it may import of fluxkern, besides itself
    "_files": set(),
    "_modules": set(),
    "_ops": set(),
    "reference": set(),
    "kernels": set(),
    "ops": {"_ops", "reference"},
    "cases": set(),
    "testing": {"reference"},
    "bench": {"_files", "cases", "ops", "reference", "testing"},
    "model": {"_files", "_modules", "ops"},
    "checkpoint": {"_files", "model", "ops"},
    "pipeline": {"_files", "checkpoint", "model", "ops"},
    "integrations": {"_modules", "checkpoint", "model", "ops"},
    "compact": {"_files", "checkpoint", "model", "ops", "pipeline"},
    "cli": {"_files", "bench", "cases", "checkpoint", "compact", "model", "ops", "pipeline"},
    "__main__": {"cli"},
}
KERNELS = {"fluxkern.kernels", "fluxkern._C_cpu", "fluxkern._C_cuda", "triton"}
FILES = sorted(PACKAGE.rglob("*.py"))
PROJECT = ("fluxkern", "benchmarks", "hub", "examples")
PRIVATE_MODULES: set[str] = set()  # of another folder that a file may name


def name_of(file: Path) -> tuple[str, ...]:
    parts = (PACKAGE.name, *file.relative_to(PACKAGE).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def nodes(tree: ast.AST, *, lazy: bool) -> Iterator[ast.AST]:
    """All nodes but those for a type checker; without those inside functions unless lazy."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node) or (
            not lazy and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ):
            continue
        yield node
        yield from nodes(node, lazy=lazy)


def imported(file: Path, *, lazy: bool = True) -> set[str]:
    """Full dotted names: `from .a import b` gives fluxkern.a.b."""
    name, found = name_of(file), set()
    package = name if file.stem == "__init__" else name[:-1]
    for node in nodes(ast.parse(file.read_text()), lazy=lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            start = ".".join((*base, *([node.module] if node.module else [])))
            found |= {f"{start}.{alias.name}" for alias in node.names}
    return found


def layers_imported(file: Path, *, lazy: bool = True) -> set[str]:
    parts = (name.split(".") for name in imported(file, lazy=lazy))
    found = {p[1] for p in parts if p[0] == PACKAGE.name and len(p) > 1}
    return found - {"__version__"}


def top_levels(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.fixture(params=FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def file(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_imports_point_down(file: Path):
    if file == PACKAGE / "__init__.py":
        assert layers_imported(file) <= {"integrations", "ops", "pipeline"}
        return
    layer = name_of(file)[1]
    assert layer in LAYERS, "a new layer: say above what it may import"
    assert layers_imported(file) <= LAYERS[layer] | {layer}


def test_only_load_knows_kernels(file: Path):
    if "kernels" in name_of(file) or name_of(file) == ("fluxkern", "ops", "_load"):
        return
    for name in imported(file):
        assert not any(name == kernel or name.startswith(f"{kernel}.") for kernel in KERNELS)


def modules_of_ours(tree: ast.AST) -> set[str]:
    """Names under which a file has modules or packages of this project."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (
            node.level or (node.module or "").split(".")[0] in PROJECT
        ):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            ours = (alias for alias in node.names if alias.name.split(".")[0] in PROJECT)
            found |= {alias.asname or alias.name.split(".")[0] for alias in ours}
    return found


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names_reached(source: str) -> set[str]:
    """Private names of another file that a file imports or reads as an attribute."""
    tree = ast.parse(source)
    modules, found = modules_of_ours(tree), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (
            node.level or (node.module or "").split(".")[0] in PROJECT
        ):
            if node.module:  # `from . import _module` names a module
                found |= {alias.name for alias in node.names if private(alias.name)}
        elif isinstance(node, ast.Attribute) and private(node.attr):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in modules:
                found.add(f"{ast.unparse(node.value)}.{node.attr}")
    return found


SOURCES = [
    file
    for folder in ("fluxkern", "benchmarks", "hub", "examples")
    for file in sorted((PACKAGE.parent / folder).rglob("*.py"))
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda f: str(f.relative_to(PACKAGE.parent)))
def test_no_file_reaches_a_private_name_of_another(source: Path):
    assert private_names_reached(source.read_text()) <= PRIVATE_MODULES


@pytest.mark.parametrize(
    "source, found",
    [
        ("from . import _module\n_module.run()", set()),
        ("from ._module import run, _walk", {"_walk"}),
        ("from . import other\nother._walk()", {"other._walk"}),
        (
            "from fluxkern import ops\nops._backends._registry",
            {"ops._backends", "ops._backends._registry"},
        ),
        ("import fluxkern.ops\nfluxkern.ops._x", {"fluxkern.ops._x"}),
        ("import torch\ntorch._C._x\nself._mine\n__version__", set()),
    ],
)
def test_a_reach_for_a_private_name_is_seen(source: str, found: set[str]):
    assert private_names_reached(source) == found


def test_kernels_import_torch_triton_and_each_other_alone(file: Path):
    if "kernels" in name_of(file):
        others = top_levels(imported(file)) - set(sys.stdlib_module_names)
        assert others <= {"torch", "triton", "fluxkern"}
        assert layers_imported(file) <= {"kernels"}


def test_no_layer_above_ops_looks_into_it(file: Path):
    if name_of(file)[:2] != ("fluxkern", "ops"):
        assert not any(name.startswith("fluxkern.ops._") for name in imported(file))


def test_nothing_imports_diffusers_and_transformers_is_imported_late(file: Path):
    if "integrations" not in name_of(file):
        assert "diffusers" not in top_levels(imported(file))
    assert "transformers" not in top_levels(imported(file, lazy=False))


def test_ast_reading_sees_what_python_imports():
    """The tests above would pass on nothing: these are known."""
    assert layers_imported(PACKAGE / "ops" / "norm_modulate.py") == {"ops", "reference"}
    assert layers_imported(PACKAGE / "model" / "transformer.py") == {"_modules", "model", "ops"}
    assert "model" in layers_imported(PACKAGE / "pipeline.py")
    text_encoder = PACKAGE / "model" / "text_encoder.py"
    assert "transformers" in top_levels(imported(text_encoder))
    assert "transformers" not in top_levels(imported(text_encoder, lazy=False))


# what one fresh process sees when it imports fluxkern after torch

PROBE = """
import json, logging, sys, threading, warnings
import torch
before = {"modules": set(sys.modules), "threads": torch.get_num_threads(),
          "filters": list(warnings.filters), "random": torch.get_rng_state(),
          "running": threading.active_count()}
written = []
def watch(event, args):
    if event == "open" and isinstance(args[2], int) and args[2] & 0b11:
        written.append(str(args[0]))
    if event in ("os.mkdir", "os.rename", "os.remove", "subprocess.Popen", "socket.connect"):
        written.append(f"{event} {args}")
sys.addaudithook(watch)
import fluxkern
print(json.dumps({
    "loaded": sorted({name.split(".")[0] for name in set(sys.modules) - before["modules"]}),
    "ours": sorted(name for name in sys.modules if name.startswith("fluxkern")),
    "written": list(written),
    "handlers": len(logging.root.handlers) + len(logging.getLogger("fluxkern").handlers),
    "level": logging.getLogger("fluxkern").level,
    "filters": before["filters"] == list(warnings.filters),
    "random": torch.equal(before["random"], torch.get_rng_state()),
    "threads": before["threads"] == torch.get_num_threads(),
    "running": threading.active_count() - before["running"],
    "cuda": torch.cuda.is_initialized(),
    "dtype": str(torch.get_default_dtype()),
    "pipeline": fluxkern.FluxPipeline.__name__,
    "with pipeline": sorted({name.split(".")[0] for name in sys.modules}),
    "exports": {name: type(getattr(fluxkern, name)).__name__ for name in fluxkern.__all__},
}))
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("fresh")
    environment = {
        **{name: v for name, v in os.environ.items() if not name.startswith(("FLUXKERN", "HF_"))},
        "PYTHONPATH": str(PACKAGE.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(folder),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"left": list(folder.iterdir()), "said": done.stderr}


def test_import_loads_no_heavy_package(probe: dict):
    heavy = {"transformers", "diffusers", "triton", "tokenizers", "huggingface_hub", "PIL", "tqdm"}
    assert not heavy & set(probe["loaded"])


def test_import_loads_no_layer_before_its_first_use(probe: dict):
    assert probe["ours"] == ["fluxkern"]


def test_import_writes_no_file_and_says_nothing(probe: dict):
    assert probe["written"] == []
    assert probe["left"] == []
    assert probe["said"] == ""


def test_import_configures_no_logging_and_changes_no_global(probe: dict):
    assert (probe["handlers"], probe["level"]) == (0, 0)
    assert probe["filters"] and probe["random"] and probe["threads"]
    assert (probe["cuda"], probe["dtype"], probe["running"]) == (False, "torch.float32", 0)


def test_package_exports_the_pipeline_the_drop_in_explain_and_ops(probe: dict):
    assert probe["exports"] == {
        "FluxPipeline": "type",
        "__version__": "str",
        "accelerate": "function",
        "explain": "function",
        "load_lora": "function",
        "ops": "module",
        "restore": "function",
        "unload_loras": "function",
    }


def test_the_pipeline_class_itself_loads_neither_transformers_nor_diffusers(probe: dict):
    assert not {"transformers", "diffusers"} & set(probe["with pipeline"])
