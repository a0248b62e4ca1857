"""The house: what may import what, no circle, and a core that asks nobody who he is."""

import ast
import io
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1] / "src" / "onpath"

MAY_IMPORT: dict[str, set[str]] = {
    "records": set(),
    "system": set(),
    "divergence": set(),
    "transport": {"system"},
    "losses": {"divergence", "system"},
    "gym": {"transport", "system"},
    "data": {"records", "system", "gym"},
    "grade": {"data", "records", "system"},
    "evaluate": {"grade", "records", "system"},
    "config": {"data", "losses", "records", "system"},
    "engines": {"config", "data", "losses", "records", "system"},
    "methods": {"config", "engines", "data", "grade", "losses", "transport", "records", "system"},
    "run": {
        *("config", "data", "engines", "evaluate", "grade", "losses", "methods", "records", "system"),
        "transport",
    },
    "training": {"config", "data", "engines", "methods", "records", "run", "system"},
    "commands": {
        *(
            "config",
            "data",
            "divergence",
            "engines",
            "evaluate",
            "grade",
            "gym",
            "losses",
            "methods",
            "records",
        ),
        *("run", "system", "training", "transport"),
    },
}
"""Top-level entry → the others that it may import, at the top of a file or inside a function."""

ONE_LOOKUP = {("data", "gym"): "data/tasks.py"}
"""Arrows that stand in one file alone."""

FLOORS = 12
ENTRIES = 15


def module_of(path: Path) -> str:
    parts = path.relative_to(HOUSE).with_suffix("").parts
    return ".".join(["onpath", *(parts[:-1] if parts[-1] == "__init__" else parts)])


MODULES = {module_of(path): path for path in sorted(HOUSE.rglob("*.py"))}


def imports(path: Path) -> Iterator[str]:
    """Modules of onpath that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "onpath":
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                yield whole if whole in MODULES else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.partition(".")[0] == "onpath")


def entry(module: str) -> str:
    """The top-level entry that a module is in; empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


ARROWS = {
    (module, target) for module, path in MODULES.items() for target in imports(path) if target != module
}


def test_the_top_level_explains_the_library() -> None:
    names = {
        p.stem if p.suffix == ".py" else p.name
        for p in HOUSE.iterdir()
        if not p.name.startswith((".", "__py"))
    }
    assert names - {"__init__", "__main__", "py.typed"} == set(MAY_IMPORT)
    assert len(MAY_IMPORT) <= ENTRIES


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_what_may_import_what(room: str) -> None:
    wrong = sorted(
        f"{a} -> {b}" for a, b in ARROWS if entry(a) == room and entry(b) not in {room, *MAY_IMPORT[room]}
    )
    assert not wrong, "an arrow that the plan does not have"


@pytest.mark.parametrize(("pair", "place"), ONE_LOOKUP.items())
def test_what_stands_in_one_file_alone(pair: tuple[str, str], place: str) -> None:
    files = {str(MODULES[a].relative_to(HOUSE)) for a, b in ARROWS if (entry(a), entry(b)) == pair}
    assert files == {place}


def test_no_circle_and_few_floors() -> None:
    below: dict[str, set[str]] = defaultdict(set)
    for a, b in ARROWS:
        below[a].add(b)
    floor: dict[str, int] = {}

    def height(module: str, above: tuple[str, ...]) -> int:
        assert module not in above, f"a circle: {' -> '.join((*above[above.index(module) :], module))}"
        if module not in floor:
            floor[module] = 1 + max((height(b, (*above, module)) for b in below[module]), default=0)
        return floor[module]

    for module in MODULES:
        height(module, ())
    rooms: dict[str, set[str]] = defaultdict(set)
    for a, b in ARROWS:
        if entry(a) != entry(b) and entry(b):
            rooms[entry(a)].add(entry(b))

    def storey(room: str) -> int:
        return 1 + max(map(storey, rooms[room]), default=0)

    assert max(map(storey, list(rooms))) <= FLOORS


ASKED = {"Method", "MethodOptions", "Engine", "Teacher"}
"""Bases whose subclasses only their own package may tell apart."""


def classes() -> dict[str, tuple[str, set[str]]]:
    """Class → its package and the names of its bases."""
    found = {}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found[node.name] = (entry(module), {b.id for b in node.bases if isinstance(b, ast.Name)})
    return found


def family(name: str, known: dict[str, tuple[str, set[str]]]) -> set[str]:
    """A class and all that it derives from."""
    return {name}.union(*(family(base, known) for base in known.get(name, ("", set()))[1]))


def test_the_core_asks_nobody_who_he_is() -> None:
    """No isinstance and no match on a method, its options, an engine or a teacher outside its own package."""
    known, asked = classes(), []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named: list[ast.AST] = []
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "isinstance"
            ):
                named = list(ast.walk(node.args[1]))
            elif isinstance(node, ast.MatchClass):
                named = [node.cls]
            for name in {n.id for n in named if isinstance(n, ast.Name)}:
                if family(name, known) & ASKED and known[name][0] != entry(module):
                    asked.append(f"{module}: {name}")
    assert asked == []


def test_the_story_is_short_and_no_function_is_long() -> None:
    """What a reader can hold: the story in 200 lines, a function in 100, most of them far shorter."""
    assert len((HOUSE / "training.py").read_text(encoding="utf-8").splitlines()) <= 200
    lengths = {
        f"{path.relative_to(HOUSE)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in HOUSE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    }
    assert {name: lines for name, lines in lengths.items() if lines > 100} == {}
    assert sorted(lengths.values())[len(lengths) // 2] <= 15


SMALL = 80
INTERVENTIONS = (
    *("branch.py", "bridge.py", "truncate.py"),
    *("relay/method.py", "relay/side_by_side.py", "relay/triggers.py"),
)


def code_lines(path: Path) -> int:
    """Lines that hold code: no docstring, comment or blank."""
    text, kept = path.read_text(), set[int]()
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (*silent, tokenize.ENDMARKER):
            kept |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                kept -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(kept)


def test_lines_of_code_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text('"""Two\nlines."""\n\nA = (  # why\n    1,\n\n)\n"""Of A."""\nB = """one\ntwo"""\n')
    assert code_lines(path) == 5


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_an_idea_stays_small(name: str) -> None:
    """An intervention on trajectories is a file of at most 80 lines of code, so that it can be read at a
    sitting and copied for the next one; relay, which also decodes both models side by side, is three, each
    within."""
    assert code_lines(HOUSE / "methods" / name) <= SMALL


def test_relay_has_no_part_more() -> None:
    parts = {f"relay/{path.name}" for path in (HOUSE / "methods" / "relay").glob("*.py")}
    assert parts == {name for name in INTERVENTIONS if "/" in name} | {"relay/__init__.py"}
