"""What the READMEs say is real: commands, paths, links, tests and make targets; the list of packages is complete."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from pathlib import Path

import pytest

from pipeline.cli.main import COMMANDS
from pipeline.config.compose import compose
from pipeline.config.load import load_config, take_run
from pipeline.config.request import Request
from pipeline.contracts.columns import InputSpec
from pipeline.models import build_classifier
from pipeline.models.custom import CustomParams
from pipeline.stages.search import SEARCH_DEFAULTS

ROOT = Path(__file__).parents[2]
FOLDERS = ("conf", "jobs", "pipeline", "tests")
READMES = [ROOT / "README.md", *sorted(path for name in FOLDERS for path in (ROOT / name).rglob("README.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in READMES}
PLACES = {"RUNS": "/shared/runs", "NAME": "student", "TEACHER": "/shared/runs/teacher"}  # of jobs/submit.sh


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def lines_of_bash(text: str) -> list[str]:
    """Lines of the bash blocks, joined where they go on, with the variables that a block sets put in."""
    lines = []
    for block in blocks(text, "bash"):
        variables: dict[str, str] = {}
        for line in block.replace("\\\n", " ").splitlines():
            if found := re.fullmatch(r'(\w+)="(.*)"', line):
                variables[found[1]] = found[2]
            elif line.strip() and not line.startswith("#"):
                lines.append(re.sub(r"\$(\w+)", lambda name, known=variables: known[name[1]], line))
    return lines


LINES = [(name, line) for name, text in TEXTS.items() for line in lines_of_bash(text)]


def command_of(line: str) -> str | None:
    """What follows ``python -m pipeline``, also behind ``ray job submit``, or what ``jobs/submit.sh`` makes of it."""
    if found := re.search(r"python -m pipeline (.+)", line):
        return " ".join(found[1].split())
    if found := re.search(r"jobs/submit\.sh (\S+)(.*)", line):
        places = [f"run.dir={PLACES['RUNS']}/{PLACES['NAME']}", f"teacher.checkpoint={PLACES['TEACHER']}"]
        return " ".join([found[1], *places, *found[2].split()])
    return None


COMMAND_LINES = sorted({(name, command) for name, line in LINES if (command := command_of(line))})


def name_of(command: str) -> str:
    """The command's name, which may be of two words; the longest of those that fit."""
    names = [known.name for known in COMMANDS if f"{command} ".startswith(f"{known.name} ")]
    return max(names, key=len, default=command.split()[0])


def write_examples(folder: Path) -> None:
    """Writes the code blocks that begin with the name of their file, and the space of a version that left folders."""
    for example in [block for text in TEXTS.values() for kind in ("yaml", "python") for block in blocks(text, kind)]:
        name = example.splitlines()[0].removeprefix("# ")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(example)
    for space in (ROOT / "tests" / "fixtures").glob("*/space.yaml"):
        shutil.copy(space, folder)


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def backticked() -> list[tuple[str, str]]:
    """(README, what stands between backticks in its prose), in order, without names that stand for others."""
    found = {(name, code) for name, text in TEXTS.items() for code in re.findall(r"`([^`\n]+)`", without_code(text))}
    return sorted((name, code) for name, code in found if "NAME" not in code)


def paths() -> list[tuple[str, str]]:
    """(README, path): what is named as lying in a folder of this project, from its root or from the README on."""
    found = []
    for name, code in backticked():
        top = re.fullmatch(r"([\w.-]+)/[\w./-]*", code)
        if top and (top[1] in (*FOLDERS, ".ci") or (ROOT / name).parent.joinpath(top[1]).is_dir()):
            found.append((name, code))
    return found


def test_readme_is_read_in_minutes() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 300


def test_there_are_commands_to_check() -> None:
    assert len(COMMAND_LINES) > 40
    assert {name_of(command) for _, command in COMMAND_LINES} == {command.name for command in COMMANDS}


@pytest.mark.parametrize(("readme", "line"), LINES)
def test_every_line_of_bash_is_of_a_kind_that_is_checked(readme: str, line: str) -> None:
    if command_of(line):
        return  # below
    words = shlex.split(line, comments=True)
    match words:
        case ["make", target, *_]:
            assert target in make_targets()
        case ["python", "-m", module, *_] if module.startswith("tests."):
            assert any((ROOT / module.replace(".", "/")).with_suffix(end).exists() for end in ("", ".py"))
        case ["export", setting]:
            assert setting.partition("=")[0] in ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE")
        case _:
            assert words == ["mlflow", "ui", "--backend-store-uri", "sqlite:///runs/mlflow.db"]


@pytest.mark.parametrize(("readme", "command"), COMMAND_LINES)
def test_every_command_is_a_valid_request(
    readme: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_examples(tmp_path)
    monkeypatch.chdir(tmp_path)
    name = name_of(command)
    arguments = shlex.split(command.removeprefix(name), comments=True)
    conf = [Path(arguments.pop(arguments.index("--conf") + 1)) for _ in range(arguments.count("--conf"))]
    for folder in conf:
        if folder.parts[0] == "runs":  # what a run has left: a search's winner
            (folder / "experiment").mkdir(parents=True)
            (folder / "experiment" / "winner.yaml").write_text(
                "# @package _global_\nteacher: {checkpoint: weights.pt}\n"
            )
    overrides = [argument for argument in arguments if argument != "--conf"]
    of_a_run = name in ("evaluate", "predict", "search show")
    run, others = take_run(overrides, "run" if of_a_run else "resume")
    if name == "predict":
        out, others = take_run(others, "out", "a Parquet file")
        assert out
    if name == "search show":
        _, others = take_run(others, "out", "a file")
    if name.startswith("cache "):
        _, others = take_run(others, "name")
        others = [text for text in others if not text.startswith("plan.")]
    if run is not None or of_a_run or name == "doctor" or len(others) < len(overrides):
        compose(others, conf)  # the run, or the machine, is needed for more
        assert not of_a_run or run
        return
    defaults = {"train-teacher": ("loss=cross_entropy",), "search": SEARCH_DEFAULTS}.get(name, ())
    load_config(Request(name, tuple(overrides), tuple(conf)), defaults)


def test_own_network_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_examples(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    params = CustomParams(factory="my_networks:build", kwargs={"width": 8})
    build_classifier(params, InputSpec("image", (3, 12, 10), ("a", "b", "c")))


@pytest.mark.parametrize(("readme", "path"), paths())
def test_every_path_exists(readme: str, path: str) -> None:
    assert (ROOT / path).exists() or ((ROOT / readme).parent / path).exists()


def test_every_link_and_anchor_exists() -> None:
    links = {(name, link) for name, text in TEXTS.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)}
    broken = []
    for name, link in sorted(links):
        file, _, anchor = link.partition("#")
        target = (ROOT / name).parent / file if file else ROOT / name
        headings = re.findall(r"^#+ (.+)$", without_code(target.read_text()), re.M) if target.suffix == ".md" else []
        if not target.exists() or (anchor and anchor not in {slug(heading) for heading in headings}):
            broken.append(f"{name}: {link}")
    assert broken == []


def test_every_readme_is_reached_from_the_first() -> None:
    reached, begun = {"README.md"}, ["README.md"]
    while begun:
        name = begun.pop()
        for link in re.findall(r"\]\(([^)#\s]+\.md)[^)]*\)", TEXTS[name]):
            target = str(((ROOT / name).parent / link).resolve().relative_to(ROOT.resolve()))
            if target in TEXTS and target not in reached:
                reached.add(target)
                begun.append(target)
    assert reached == set(TEXTS)


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def test_make_targets_and_tests_exist() -> None:
    targets = {found[1] for _, code in backticked() if (found := re.fullmatch(r"make ([\w-]+)(?: .*)?", code))}
    assert targets <= make_targets()
    for _, code in backticked():
        if found := re.fullmatch(r"(?:[\w/]+/)?(test_\w+\.py)(?:::(\w+)(?:\[.*\])?)?", code):
            (file,) = (ROOT / "tests").rglob(found[1])
            assert not found[2] or f"def {found[2]}(" in file.read_text()


def test_every_package_is_listed_once_and_says_what_it_is() -> None:
    section = TEXTS["pipeline/README.md"].split("\n## Packages\n")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `([\w/]+)/` \| .+ \|$", section, flags=re.MULTILINE)
    folder = ROOT / "pipeline"
    packages = [path.parent for path in folder.rglob("__init__.py")]
    assert sorted(listed) == sorted(str(path.relative_to(folder)) for path in packages if path != folder)
    assert not [path for path in packages if not ast.get_docstring(ast.parse((path / "__init__.py").read_text()))]
