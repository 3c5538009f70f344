"""The house: which module may import which, what is pure, and how long a script and a function may be."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS

ROOMS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in (*(ROOT / "configs").rglob("*.py"), *(ROOT / name for name in (*SCRIPTS, "run_all.py")))
    if path.parent.name != "demo"
}
# imported before anything heavy
FIRST = [f"configs.{name}" for name in ("settings", "flags", "values", "secrets", "text", "words", "translation")]
LIGHT = {*FIRST, "configs.hub", "configs.network"}
HEAVY = {"torch", "transformers", "datasets", "peft", "trl", "accelerate", "numpy", "pyarrow", "evaluate"}


def imports_of(path: Path, top_only: bool = False) -> set[str]:
    """Modules that a file imports, anywhere or at its top level only; `from configs import hub` is configs.hub."""
    tree, names = ast.parse(path.read_text("utf-8")), set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (below & set(ROOMS)) or {node.module}
    return names


ARROWS = {room: imports_of(path) & set(ROOMS) for room, path in ROOMS.items()}


def reached(room: str) -> set[str]:
    """Every room that can be reached from `room` by imports."""
    seen, waiting = set(), [room]
    while waiting:
        for other in ARROWS[waiting.pop()] - seen:
            seen.add(other)
            waiting.append(other)
    return seen


def test_the_walk_sees_the_house():
    assert "configs.training.trainer" in ARROWS["configs.training.runlog"]
    assert {"configs.settings", "configs.hub", "configs.handover"} <= reached("4_evaluate_compare")


def test_nothing_imports_a_script():
    scripts = {Path(name).stem for name in (*SCRIPTS, "run_all.py")}
    assert {room: others & scripts for room, others in ARROWS.items() if others & scripts} == {}


def test_no_circle_of_imports():
    assert [room for room in ROOMS if room in reached(room)] == []


def test_imports_run_downwards():
    """settings <- hub <- device, handover, chat <- the folders of the steps."""
    floors = dict.fromkeys(FIRST, 0)
    floors |= {"configs.hub": 1, "configs.network": 1}
    floors |= {"configs.device": 2, "configs.handover": 2, "configs.chat": 2, "configs.models": 2, "configs": 0}
    for room, others in ARROWS.items():
        floor = floors.get(room, 3)
        assert {other for other in others if floors.get(other, 3) > floor} == set(), room


@pytest.mark.parametrize("room", sorted(LIGHT))
def test_what_is_imported_before_help_is_light(room):
    outside = {name.partition(".")[0] for name in imports_of(ROOMS[room], top_only=True)}
    assert outside & HEAVY == set()
    assert ARROWS[room] <= LIGHT


@pytest.mark.parametrize("name", ["statistics", "metrics"])
def test_statistics_and_metrics_are_pure(name):
    room = f"configs.evaluation.{name}"
    outside = {module.partition(".")[0] for module in imports_of(ROOMS[room])}
    assert outside <= {"math", "re", "collections", "numpy", "scipy", "rouge_score", "sacrebleu"}
    assert ARROWS[room] == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_main_reads_the_constants(script):
    """Functions take `settings`; the constants at the top are read in main() and above it, and changed nowhere."""
    from configs.settings import read_constants

    names, tree = set(read_constants(ROOT / script)), ast.parse((ROOT / script).read_text("utf-8"))
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)):
        used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and node.id in names}
        assert used <= ({"USE_4BIT"} if function.name == "main" else set()), (function.name, used)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)]


def test_scripts_and_modules_are_short_enough_to_read():
    """Aims of the design: what does not fit belongs to the libraries, or to another room."""
    aims = {SCRIPTS[0]: 550, SCRIPTS[1]: 230, SCRIPTS[2]: 230, SCRIPTS[3]: 600, "run_all.py": 300}
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text("utf-8").splitlines()) for path in ROOMS.values()}
    assert {name: n for name, n in lengths.items() if n > aims.get(name, 440)} == {}


def test_no_function_is_longer_than_a_screen_and_a_half():
    long = {}
    for room, path in ROOMS.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 80:
                long[f"{room}.{node.name}"] = node.end_lineno - node.lineno + 1
    assert long == {}
