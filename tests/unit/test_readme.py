"""README's commands and configuration are real, and its list of files is complete."""

from __future__ import annotations

import re
import shlex
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
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def lines_of_bash() -> list[str]:
    return [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]


def commands() -> list[str]:
    """What follows ``python -m pipeline`` in every bash block, also behind ``ray job submit``."""
    return [
        " ".join(found[1].split()) for line in lines_of_bash() if (found := re.search(r"python -m pipeline (.+)", line))
    ]


def name_of(command: str) -> str:
    """The command's name, which may be of two words; the longest of those that fit."""
    names = [known.name for known in COMMANDS if f"{command} ".startswith(f"{known.name} ")]
    return max(names, key=len, default=command.split()[0])


def write_examples(folder: Path) -> None:
    """Writes the code blocks that begin with the name of their file."""
    for text in (*blocks("yaml"), *blocks("python")):
        name = text.splitlines()[0].removeprefix("# ")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_there_are_commands_to_check() -> None:
    assert len(commands()) > 15
    assert {name_of(command) for command in commands()} == {command.name for command in COMMANDS}


@pytest.mark.parametrize("command", commands())
def test_every_command_is_a_valid_request(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_examples(tmp_path)
    monkeypatch.chdir(tmp_path)
    name = name_of(command)
    arguments = shlex.split(command.removeprefix(name))
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


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:conf|jobs|tests|pipeline)/[\w./-]*)`", README))))
def test_every_path_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_every_module_is_listed_once() -> None:
    (tree,) = [block for block in blocks("text") if block.startswith("pipeline/\n")]
    listed, package = [], ""
    for line in tree.splitlines()[1:]:
        name = line.split()[0]
        if name.endswith("/"):
            package = name
        else:
            listed.append(f"{package if line.startswith('    ') else ''}{name}")
            assert len(line.split()) > 2, f"{name} needs a line"
    modules = {str(path.relative_to(ROOT / "pipeline")) for path in (ROOT / "pipeline").rglob("*.py")}
    assert len(listed) == len(set(listed))
    assert set(listed) == {module for module in modules if not module.endswith("__init__.py")}


def test_make_targets_and_links_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([\w-]+)`", README)) <= targets
    headings = {
        re.sub(r"[^\w ]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", README, re.M)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", README)) <= headings
