"""Who may import whom: the code stays readable in one direction."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ALLOWED = {
    "kernels": set(),
    "gpuless": set(),
    "schedule": set(),
    "parallel": set(),
    "config": set(),
    "data": {"config"},  # its commands share the command-line layer, config/cli.py
    "model": {"kernels"},
    "hf": {"config", "data", "model"},
    "quantize": {"hf", "kernels", "model"},
    "checkpoint": {"config", "data", "hf", "model", "parallel", "quantize"},
    "generate": {"checkpoint", "config", "data", "hf", "model", "quantize"},
}
LEAVES = {"train", "eval", "bench"}


def imports() -> dict[str, set[str]]:
    """{module of ours: the modules of ours that it imports, anywhere in its file}."""
    packages = (init.parent for init in Path().glob("*/__init__.py"))
    files = [*Path().glob("*.py"), *(file for folder in packages for file in folder.rglob("*.py"))]
    names = {path: ".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files}
    ours, found = set(names.values()), {}
    for path, name in names.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = {f"{node.module}.{alias.name}" for alias in node.names}
                # `from data import tokenizer` needs data.tokenizer; another name needs the module.
                imported |= (modules & ours) or {node.module}
        found[name] = imported & ours - {name}
    return found


def test_imports_go_one_way():
    found = imports()
    parts = {name.partition(".")[0] for name in found}
    assert ALLOWED.keys() | LEAVES == parts
    for name, imported in found.items():
        part = name.partition(".")[0]
        imported = {other.partition(".")[0] for other in imported} - {part}
        assert imported <= ALLOWED.get(part, parts), f"{name} imports {imported}"
        assert not imported & LEAVES, f"{name} imports {imported & LEAVES}: those are leaves"


def test_no_files_import_each_other_in_a_circle():
    # Raises CycleError, which names the files.
    TopologicalSorter(imports()).prepare()
