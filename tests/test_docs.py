"""The documentation names what exists, and leaves nothing out."""

import importlib
import re
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from io import StringIO
from pathlib import Path

import pytest

from difftori import solver
from difftori.cli import main
from difftori.registry import find_agents, find_policies
from difftori.solver import Adjoint, Solver, Status
from difftori.trainers import known_names
from tests.support.trainers import TRAINERS

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
GUIDES = {name: text for name, text in PAGES.items() if name != "docs/changelog.md"}
RELIABILITY = PAGES["docs/reliability.md"]

OTHER_TOOLS = {
    "--nproc-per-node",
    "--standalone",
    "--traj-path",
    "--save-traj",
    "--sim-backend",
    "--no-deps",
}  # torchrun's, ManiSkill's, pip's
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()
FORBIDDEN = (
    r"made anew|the mend\b|one's own|likewise|of which|\bstoreys?\b|that are optimisers|go(es)? on where|unless given|"
    r"\bpictures?\b(?!\.)|nobody knows|whoever|what was asked|contestant(?!=)|of (its|their|our|your) own\b"
)


@cache
def output(*words: str) -> str:
    """Everything that a command prints."""
    with redirect_stdout(StringIO()) as text, redirect_stderr(text), suppress(SystemExit):
        main(list(words))
    return text.getvalue()


@cache
def names(command: str) -> list[str]:
    """The studies or benchmarks."""
    return re.findall(r"^  ([\w-]+)", output(command, "--help").split("names:")[1], re.M)


@cache
def options(*words: str) -> set[str]:
    """The options that the help of a command lists."""
    return set(re.findall(r"--[a-z][\w.-]*", output(*words, "--help").replace("_", "-")))


def commands() -> list[tuple[str, ...]]:
    """Every command with options of its own."""
    return [
        *(
            (command,)
            for command in ("demo", "collect", "data", "eval", "export", "publish", "serve", "sweep", "report")
        ),
        ("data", "render"),
        *(("train", name) for name in known_names()),
        *((command, name) for command in ("study", "bench") for name in names(command)),
    ]


def examples() -> list[tuple[str, str]]:
    """Page and words of every `difftori …` in a code block, continued lines joined."""
    found = []
    for page, text in PAGES.items():
        for block in re.findall(r"```\w*[^\n]*\n(.+?)```", text, re.S):
            lines = re.findall(r"^(?:\$ )?difftori (\S.*)$", block.replace("\\\n", " "), re.M)
            found += [(page, line.split("  #")[0].strip()) for line in lines]
    return found


def test_every_test_that_is_named_exists():
    """`file.py`, `folder/`, `file.py::test_name`; a … in the place of a file is the one before, at a name's end any end."""
    file, named = TESTS / "absent", 0
    for path, name in re.findall(r"`([\w/…]+(?:\.py|/|…))(?:::(test_\w+…?))?`", RELIABILITY):
        file = file if path == "…" else TESTS / path
        assert file.exists(), path
        if name:
            named += 1
            end = r"\w*" if name.endswith("…") else r"\b"
            assert re.search(rf"def {name.rstrip('…')}{end}\(", file.read_text()), f"{path}::{name}"
    assert named > 30


def test_the_long_tests_leave_no_policy_and_no_agent_out():
    assert sorted(TRAINERS) == known_names()


def test_every_command_exists_with_its_options():
    usage = output("--help")
    assert len(examples()) > 50
    for page, line in examples():
        words = [word for word in line.split() if word != "…"]
        if words[0].startswith("-"):
            continue
        command = words[0]
        assert re.search(rf"^  {command} ", usage, re.M), f"{page}: difftori {line}"
        if command in ("study", "bench") and words[1].islower() and "." not in words[1]:
            assert words[1] in (*names(command), "--help"), f"{page}: difftori {line}"
        known = _known(command, words[1] if len(words) > 1 else "")
        unknown = set(re.findall(r"(?<=\s)--[a-z][\w.-]*", line)) - known - {"--help"}
        assert not unknown, f"{page}: difftori {line}: {unknown}"


def _known(command: str, name: str) -> set[str]:
    if command in ("study", "bench"):
        return options(command, name) if name in names(command) else set()
    if command == "train":
        return {"--resume", *options("train", name if name in known_names() else "bc")}
    return options(command, name) if (command, name) in commands() else options(command)


def test_every_option_named_in_prose_exists():
    known = set().union(*(options(*words) for words in commands()), options(), options("train"), OTHER_TOOLS)
    lines = [line for _, line in examples()]
    for page, text in GUIDES.items():
        for line in lines:
            text = text.replace(line, "")
        text = re.sub(r"<!--.*?-->", "", text, flags=re.S).replace("--settings.", "--")
        named = set(re.findall(r"(?<![\w-])--[A-Za-z][\w.-]*\w", text)) - known
        assert not named, f"{page}: {named}"


@pytest.mark.parametrize("command", ["study", "bench"])
def test_every_study_and_benchmark_is_documented(command):
    text = "\n".join(PAGES.values())
    missing = [name for name in names(command) if f"difftori {command} {name}" not in text]
    assert not missing


def _first_column(page: str, heading: str) -> set[str]:
    """The names in backticks in the first column of the table whose header line starts with `heading`."""
    table = PAGES[page].split(f"\n{heading}", 1)[1].split("\n\n", 1)[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    return {re.split(r"\(", name)[0] for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def _exported(base: type) -> set[str]:
    """The concrete subclasses of `base` that `difftori.solver` exports."""
    members = {name: vars(solver)[name] for name in solver.__all__}
    return {name for name, m in members.items() if isinstance(m, type) and issubclass(m, base) and m is not base}


def test_the_tables_of_components_are_complete():
    assert _first_column("docs/imitation.md", "| name | method |") == set(find_policies())
    assert _first_column("docs/reinforcement.md", "| agent |") == set(find_agents())
    assert _first_column("docs/solver.md", "| solver | uses |") == _exported(Solver)
    assert _first_column("docs/solver.md", "| adjoint |") == _exported(Adjoint)
    assert _first_column("docs/solver.md", "| status |") == {status.name for status in Status}
    assert _first_column("docs/control.md", "| `Status` |") == {status.name for status in Status}


def test_the_api_page_of_the_solver_is_complete():
    missing = [name for name in solver.__all__ if not re.search(rf"\b{name}\b", PAGES["docs/api/solver.md"])]
    assert not missing


def test_counts_in_prose_are_right():
    counts = {
        "solvers": len(_exported(Solver)),
        "adjoints": len(_exported(Adjoint)),
        "trainers": len(known_names()),
        "other policies": len(find_policies()) - 1,
    }
    for page, text in GUIDES.items():
        for number, what in re.findall(rf"\b(\d+|{'|'.join(NUMBERS)}) ({'|'.join(counts)})\b", text, re.I):
            value = int(number) if number.isdigit() else NUMBERS.index(number.lower())
            assert value == counts[what] or (what == "trainers" and value == 2), f"{page}: {number} {what}"
    assert "nine solvers" in PAGES["README.md"], "the counts are not found any more"


def test_every_dotted_name_exists():
    for page, text in GUIDES.items():
        for name in re.findall(r"(?:::: |`)(difftori(?:\.\w+)+)", text):
            assert _resolves(name), f"{page}: {name}"


def _resolves(name: str) -> bool:
    """Whether this is a module, or an attribute of a module or class."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        parent, _, attribute = name.rpartition(".")
        return bool(parent) and _resolves(parent) and hasattr(_object(parent), attribute)
    return True


def _object(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        parent, _, attribute = name.rpartition(".")
        return getattr(_object(parent), attribute)


def test_the_architecture_names_every_package_and_module():
    package = ROOT / "src" / "difftori"
    entries = {p.name + "/" * p.is_dir() for p in package.iterdir() if not p.name.startswith("__")} - {"py.typed"}
    tree = PAGES["docs/architecture.md"].split("src/difftori/", 1)[1].split("```", 1)[0]
    named = set(re.findall(r"^(?:  |)(\w[\w.]*/?) ", tree, re.M)) - {"docs/examples/", "results/"}
    assert entries | {"benchmarks/"} == named


def test_the_readme_shows_an_example_that_is_run_and_links_that_exist():
    readme, folder = PAGES["README.md"], ROOT / "docs" / "examples"
    assert (folder / "plan_quick.py").read_text() in readme
    assert (folder / "plan_quick.out").read_text() in readme
    assert len(readme.splitlines()) <= 120
    for target in re.findall(r"\]\((?!http)([^)#]+)", readme):
        assert (ROOT / target).exists(), target


def test_the_pages_use_the_terms_of_the_field():
    for page, text in GUIDES.items():
        prose = re.sub(r"```.*?```|<!--.*?-->|`[^`]*`|^:::.*?$", "", text, flags=re.S | re.M)
        found = re.search(FORBIDDEN, prose, re.I)
        assert not found, f"{page}: {found[0]!r}"
