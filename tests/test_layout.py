"""Who may import whom: the code stays readable in one direction."""

import ast
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


def test_imports_go_one_way():
    files = [p for p in Path().rglob("*.py") if p.parts[0] not in ("tests", "out")]
    files = [p for p in files if not p.parts[0].startswith(".venv")]
    ours = {p.parts[0].removesuffix(".py") for p in files}
    assert ALLOWED.keys() | LEAVES == ours - {"slurm"}
    for path in files:
        part = path.parts[0].removesuffix(".py")
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
        imported = (imported & ours) - {part}
        assert imported <= ALLOWED.get(part, ours), f"{path} imports {imported}"
        assert not imported & LEAVES, f"{path} imports {imported & LEAVES}: those are leaves"
