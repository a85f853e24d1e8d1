"""Run folders as commands open them, below the current folder."""

from __future__ import annotations

from pipeline.config.compose import compose
from pipeline.config.load import LoadedConfig, load_config
from pipeline.config.request import Request
from pipeline.config.runs import Run, open_run
from pipeline.config.schema import Config
from pipeline.config.validate import build_config

TEACHER = "teacher.checkpoint=teacher.safetensors"


def build(*overrides: str, command: str = "distill") -> Config:
    return build_config(compose([TEACHER, *overrides]), command)


def load(*overrides: str, command: str = "distill") -> LoadedConfig:
    return load_config(Request(command, overrides))


def open_and_close(*overrides: str, command: str = "distill", finish: bool = False, extends: bool = False) -> Run:
    with open_run(command, build(*overrides, command=command), extends=extends) as run:
        if finish:
            run.write_result("finished", {"val/top1": 0.5})
        return run


def go_on(*overrides: str, finish: bool = False) -> Run:
    """What a stage does with the command line."""
    loaded = load(*overrides)
    with open_run("distill", loaded.config, extends=loaded.extends) as run:
        if finish:
            run.write_result("finished", {})
        return run
