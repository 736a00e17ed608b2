"""The floors of the house: imports go down only, and torch is met on one floor."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pytest
from machines import environment

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bsprof"

FLOORS = {
    "loading": 0,
    "model": 0,
    "noun": 0,
    "store": 0,
    "cache": 0,
    "errors": 0,
    "files": 0,
    "attribution": 1,
    "ceilings": 1,
    "causes": 1,
    "cgroup": 1,
    "compare": 1,
    "diagnosis": 1,
    "evidence": 1,
    "exchange": 1,
    "findings": 1,
    "history": 1,
    "metrics": 1,
    "noise": 1,
    "readings": 1,
    "replay": 1,
    "scaling": 1,
    "stats": 1,
    "loader": 2,
    "measure": 2,
    "workloads": 2,
    "report": 3,
    "sweep": 3,
    "__main__": 4,
    "ab": 4,
    "bench": 4,
    "cli": 4,
    "comparing": 4,
    "diagnosing": 4,
    "pytest_plugin": 4,
    "tracking": 4,
}
"""The room, a module or a package right below `bsprof`, and the floor it is on."""

ONE_WAY = ("loader", "measure", "workloads")
"""A watched loader is consumed by a measured step, a case builds its workload; no workload knows how it is measured."""

CHILD = "sweep.child"
"""The one module above floor 2 that runs in a case's process, and so may import floor 2 and torch."""

HEAVY = {"torch", "torchvision"}
NUMBERS = {"numpy", "scipy"}


class Import(NamedTuple):
    """One import of one module, wherever in a module's text it stands."""

    module: str
    """Where it stands, below `bsprof`: `measure.malloc`, or nothing for the package root."""
    target: str
    """What is imported, whole: `bsprof.model`, `torch`."""
    lazy: bool
    """Inside a function, or for type checkers alone: nothing is loaded when the module is."""
    typing_only: bool
    line: int

    @property
    def room(self) -> str:
        return self.module.partition(".")[0]

    @property
    def library(self) -> str:
        return self.target.partition(".")[0]

    def __str__(self) -> str:
        return f"bsprof.{self.module}:{self.line} imports {self.target}"


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(module: str, tree: ast.AST, is_package: bool) -> Iterator[Import]:
    def visit(node: ast.AST, lazy: bool, typing_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, lazy, typing_only, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(module, node, is_package)
            for alias in node.names:
                # `from bsprof import cgroup` imports a module, `from bsprof.model import Case` a name in one.
                inner = f"{base}.{alias.name}"
                known = inner.removeprefix("bsprof.") in MODULES
                yield Import(module, inner if known else base, lazy, typing_only, node.lineno)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, True, True)
            for child in node.orelse:
                yield from visit(child, lazy, typing_only)
            return
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside, typing_only)

    yield from visit(tree, False, False)


def absolute(module: str, node: ast.ImportFrom, is_package: bool) -> str:
    """Resolve `from ..model import Case` against the module that it stands in."""
    if not node.level:
        return node.module or ""
    parts = ["bsprof", *(part for part in module.split(".") if part)]
    package = parts if is_package else parts[:-1]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


IMPORTS = [
    found
    for module, path in MODULES.items()
    for found in imports_of(module, ast.parse(path.read_text()), path.name == "__init__.py")
]
OWN = [found for found in IMPORTS if found.library == "bsprof"]


def target_room(found: Import) -> str:
    return found.target.removeprefix("bsprof").removeprefix(".").partition(".")[0]


# --- what the text says -----------------------------------------------------------------------------


def test_every_room_is_on_a_floor():
    rooms = {module.partition(".")[0] for module in MODULES if module}
    assert rooms <= FLOORS.keys(), "give the new room a floor"


def test_nothing_inside_imports_the_package_root():
    assert [str(found) for found in OWN if not target_room(found)] == []


def test_imports_go_down_only():
    """A room may import itself and lower floors; on floors 2 and 3 the rooms of one floor do not know each other."""
    wrong = []
    for found in OWN:
        here, there = FLOORS.get(found.room, 5), FLOORS.get(target_room(found), 0)
        level = found.room == target_room(found) or (here == there and here in (0, 1, 4))
        level = level or (found.room, target_room(found)) in combinations(ONE_WAY, 2)
        if not (there < here or level):
            wrong.append(str(found))
    assert wrong == []


def test_floor_2_is_entered_from_a_cases_process_only():
    """Not even lazily elsewhere: the sweep's parent and the report would hold torch while they do other work."""
    wrong = [
        str(found)
        for found in OWN
        if FLOORS.get(target_room(found)) == 2 and FLOORS.get(found.room) == 3 and found.module != CHILD
    ]
    assert wrong == []


def test_torch_is_met_on_floor_2_only():
    wrong = [
        str(found)
        for found in IMPORTS
        if found.library in HEAVY and not found.typing_only and FLOORS.get(found.room) != 2 and found.module != CHILD
    ]
    assert wrong == []


def test_the_sweep_does_not_load_its_child():
    """Loading it loads torch; only a function that itself runs in the case's process may import it."""
    wrong = [str(found) for found in OWN if found.target == f"bsprof.{CHILD}" and not found.lazy]
    assert wrong == []


def test_the_nouns_need_no_numbers():
    assert [str(found) for found in IMPORTS if found.library in NUMBERS and FLOORS.get(found.room) == 0] == []


def test_the_top_floor_and_the_root_load_nothing_until_asked():
    """`--help` must not pay for what only a command needs; the nouns and errors are small enough to be there."""
    wrong = [
        str(found)
        for found in IMPORTS
        if not found.lazy
        and found.room in ("", "cli")
        and (found.library in HEAVY | NUMBERS | {"rich"} or (found in OWN and FLOORS.get(target_room(found), 0) > 0))
    ]
    assert wrong == []


def test_no_module_is_named_for_nothing():
    names = {part for module in MODULES for part in module.split(".")}
    assert names.isdisjoint({"utils", "util", "helpers", "helper", "common", "misc"})


# --- what a real process loads ----------------------------------------------------------------------


def loaded_by(code: str) -> set[str]:
    """Return the libraries in `sys.modules` after `code` ran in a fresh interpreter."""
    report = "import sys; print('\\nLOADED', *sorted({name.partition('.')[0] for name in sys.modules}))"
    command = [sys.executable, "-c", f"{code}\n{report}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED")[2].split())


RUN = """
import sys
from bsprof.cli import main
sys.argv = ["bsprof", *{arguments!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


def test_importing_the_package_and_the_command_line_loads_no_torch():
    loaded = loaded_by("import bsprof, bsprof.cli")
    assert loaded.isdisjoint(HEAVY | NUMBERS)


def test_help_loads_no_torch():
    loaded = loaded_by(RUN.format(arguments=["--help"]))
    assert loaded.isdisjoint(HEAVY | NUMBERS)


def test_showing_a_result_loads_no_torch(golden_result):
    loaded = loaded_by(RUN.format(arguments=["show", str(golden_result)]))
    assert loaded.isdisjoint(HEAVY)


@pytest.fixture
def golden_result(tmp_path):
    """A small result file: one case that failed and nothing measured, so it needs no run to be made."""
    import msgspec

    from bsprof.model import Case, Measurement, Outcome, Plan, Result, Settings, case_key

    settings = Settings()
    failed = Measurement(
        case=Case(key=case_key(settings), settings=settings),
        outcome=Outcome(kind="timeout", message="past its deadline of 300 s"),
        wall_s=300.0,
    )
    result = Result(
        created="2026-01-01T00:00:00Z", plan=Plan(), environment=environment(), measurements=[failed], wall_s=300.0
    )
    path = tmp_path / "result.json"
    path.write_bytes(msgspec.json.encode(result))
    return path
