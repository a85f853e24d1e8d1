"""The command line: help at once, requests as typed, exit codes."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from pipeline.cli import main as cli
from pipeline.config.request import Request
from pipeline.errors import ConfigError, TrainingError

ROOT = Path(__file__).parents[2]
Install = Callable[[Callable[[Request], int]], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a function in the place of every stage."""

    def put(stage: Callable[[Request], int]) -> None:
        module = ModuleType("fake_stages")
        module.run = stage  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "fake_stages", module)
        fakes = tuple(cli.Command(c.name, c.summary, "fake_stages:run", c.details) for c in cli.COMMANDS)
        monkeypatch.setattr(cli, "COMMANDS", fakes)

    return put


@pytest.mark.parametrize("arguments", [["--help"], ["distill", "--help"]])
def test_help_answers_at_once(arguments: list[str]) -> None:
    durations = []
    for _ in range(5):
        started = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-m", "pipeline", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        durations.append(time.perf_counter() - started)
    assert min(durations) < 0.3
    assert "usage: python -m pipeline" in result.stdout


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"  {command.name} " in text
        assert cli.main([command.name, "--help"]) == 0
        assert f"python -m pipeline {command.name}" in capsys.readouterr().out.split("examples:")[1]


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_every_command_has_its_stage(command: cli.Command) -> None:
    module, _, function = command.stage.partition(":")
    source = ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text()  # importing it would import Ray
    assert function in {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "required: COMMAND"),
        (["distil"], "unknown command 'distil'; did you mean distill?"),
        (["zzz"], "unknown command 'zzz'; known: validate, train-teacher"),
        (["distill", "--cnof", "x"], "unrecognized arguments: --cnof"),
    ],
)
def test_a_mistyped_command_ends_with_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_the_request_is_what_was_typed(install: Install) -> None:
    requests: list[Request] = []

    def stage(request: Request) -> int:
        requests.append(request)
        return 0

    install(stage)
    assert cli.main(["distill", "a=1", "--conf", "x", "b.c=[1, 2]", "--debug", "--conf", "y", "~d"]) == 0
    assert requests == [Request("distill", ("a=1", "b.c=[1, 2]", "~d"), (Path("x"), Path("y")), debug=True)]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("train.epochs: expected an integer"), 2, "ConfigError: train.epochs: expected an integer\n"),
        (TrainingError("the loss is not finite", exit_code=1), 1, "TrainingError: the loss is not finite\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (ValueError("one\n two"), 1, "unexpected ValueError: one two; run with --debug for the traceback\n"),
    ],
)
def test_errors_become_a_sentence_and_an_exit_code(
    error: BaseException, code: int, said: str, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage(request: Request) -> int:
        raise error

    install(stage)
    assert cli.main(["distill"]) == code
    assert capsys.readouterr().err == said
    if not isinstance(error, KeyboardInterrupt):
        assert cli.main(["distill", "--debug"]) == code
        assert "Traceback" in capsys.readouterr().err


def test_the_stages_exit_code_is_the_commands(install: Install) -> None:
    install(lambda request: 1)
    assert cli.main(["evaluate", "run=x"]) == 1


def test_the_module_ends_with_the_code_of_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pipeline", "distil"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "did you mean distill?" in result.stderr
    assert result.stdout == ""
