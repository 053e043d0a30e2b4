"""Who may import whom: the code stays readable in one direction."""

import ast
from pathlib import Path

ALLOWED = {
    "kernels": set(),
    "config": set(),
    "data": set(),
    "gpuless": set(),
    "schedule": set(),
    "runlog": set(),
    "hardware": {"config", "kernels"},
    "parallel": set(),
    "model": {"kernels"},
    "tensor_files": set(),
    "hf_layout": {"model", "parallel", "tensor_files"},
    "hf_export": {"model", "data", "hf_layout", "tensor_files"},
    "manifest": {"parallel", "tensor_files"},
    "saver": {"manifest", "tensor_files"},
    "checkpoint": {
        "model", "parallel", "data", "schedule", "tensor_files", "manifest", "saver",
        "hf_layout", "hf_export",
    },
    "quantize": {"model", "kernels", "data", "hf_layout", "hf_export", "tensor_files"},
    "loading": {"model", "data", "hf_layout", "quantize", "checkpoint", "tensor_files"},
    "start": {"checkpoint", "config", "data", "hf_layout", "model", "parallel"},
    "completion": {"model", "data", "tensor_files"},
}  # fmt: skip
LEAVES = {"train", "generate", "eval", "bench"}


def test_imports_go_one_way():
    files = [p for p in Path().rglob("*.py") if p.parts[0] not in ("tests", "out")]
    files = [p for p in files if not p.parts[0].startswith(".venv")]
    ours = {p.parts[0].removesuffix(".py") for p in files}
    assert ALLOWED.keys() | LEAVES <= ours
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
