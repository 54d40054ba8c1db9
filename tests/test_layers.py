"""The import order of the house: each file imports only from its left, and heavy packages have one home."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORDER = ["errors quiet fused", "sums", "metrics verdict tables", "sketch", "trace geometry", "checkpoint",
         "cases bundle threads synth drafts", "streaming", "graph.contract", "store host graph", "engines",
         "oracle export engines.*", "bounds plan ladder greedy localize audit", "policy run", "recheck signing", "gate",
         "options attest apart", "background", "shipped", "benign", "subject", "probes", "rungs causes", "scenes",
         "zoom report calibrate exhibits", "session rerender", "faults", "terminal doctor arguments checking", "commands",
         "cli pytest_plugin"]
HOMES = {"coreai_torch": {"export"}, "coreai_opt": {"export"}, "coreai": {"engines.*", "export"},
         "transformers": {"oracle"}, "jinja2": {"report"}, "rich": {"terminal", "doctor"},
         "numba": {"fused"}}
JUDGES = {"metrics", "verdict", "ladder", "greedy", "localize", "gate", "report", "bounds", "policy", "run",
          "audit", "plan", "recheck", "tables", "sketch", "sums"}
HEAVY = {"torch", "transformers", "coreai", "coreai_torch", "coreai_opt"}


def _unit(module: str) -> str:
    """`harness.engines.coreai` -> `engines.*`; `harness.oracle.hooks` -> `oracle`."""
    parts = module.removeprefix("harness").lstrip(".").split(".")
    if parts[0] == "engines" and len(parts) > 1:
        return "engines.*"
    return "graph.contract" if parts[:2] == ["graph", "contract"] else parts[0]


LEVEL = {unit: level for level, row in enumerate(ORDER) for unit in row.split()}


def _files():
    for path in sorted((ROOT / "harness").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module != "harness":
            yield module, path


def _imports(path: Path):
    """(module, inside a function or a TYPE_CHECKING block)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            known = {module for module, _ in _files()}
            yield from ((name if name in known else node.module, id(node) not in top) for name in names)


def test_every_file_stands_in_the_order():
    assert {_unit(module) for module, _ in _files()} <= set(LEVEL), "a new file needs its place in ORDER"


def test_imports_come_from_the_left():
    wrong = [f"{module} imports {name}" for module, path in _files() for name, _ in _imports(path)
             if name.startswith("harness.") and _unit(name) in LEVEL
             and LEVEL[_unit(name)] > LEVEL[_unit(module)]]
    assert not wrong


def test_heavy_packages_have_one_home():
    wrong = [f"{module} imports {name}" for module, path in _files() for name, _ in _imports(path)
             if (home := HOMES.get(name.split(".")[0])) and _unit(module) not in home]
    assert not wrong


def test_judges_import_no_model_and_no_engine():
    wrong = [f"{module} imports {name}" for module, path in _files() if _unit(module) in JUDGES
             for name, _ in _imports(path)
             if name.split(".")[0] in HEAVY or name.startswith(("harness.graph", "harness.engines", "harness.oracle",
                                                                "harness.export", "harness.subject"))]
    assert not wrong


def test_no_import_cycle():
    graph = {module: {name for name, lazy in _imports(path) if name.startswith("harness.") and not lazy}
             for module, path in _files()}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"cycle: {' -> '.join((*above, module))}"
        if module not in done:
            for name in graph.get(module, ()):
                visit(name, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_help_loads_nothing_heavy():
    code = "import sys; from harness.cli import parser; parser().format_help(); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not [name for name in sorted(HEAVY | set(HOMES)) if f"'{name}'" in loaded]
