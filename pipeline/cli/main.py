"""``python -m pipeline COMMAND ...``: finds the stage of a command and turns errors into exit codes.

Nothing heavy is imported here: ``--help`` and a mistyped command answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.request import Request
from pipeline.errors import PipelineError

EXIT_BEFORE_WORK = 2
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        name: as typed.
        summary: one line for the list of commands.
        stage: ``module:function``; the function takes a ``Request`` and returns the exit code.
        details: what it does, its usual keys, examples.
    """

    name: str
    summary: str
    stage: str
    details: str


_GROUPS = """\
Groups (--conf DIR adds your own choices): data, teacher, student, loss, train, search, cluster, cache, tracking,
experiment. A group also takes a file: group=FILE.yaml.
Every key of the configuration can be set by its path; a wrong one is answered with the nearest known.
"""

COMMANDS: tuple[Command, ...] = (
    Command(
        "validate",
        "check a configuration and show what it amounts to, without starting anything",
        "pipeline.stages.validate:validate",
        """\
examples:
  python -m pipeline validate data=digits student=mlp teacher.checkpoint=runs/teacher
  python -m pipeline validate experiment=digits_demo
""",
    ),
    Command(
        "train-teacher",
        "train the network of the group teacher on labels",
        "pipeline.stages.train_teacher:train_teacher",
        """\
usual keys: teacher=..., data=..., train.epochs, train.batch_size, train.optimizer.lr, run.dir, run.seed

examples:
  python -m pipeline train-teacher teacher=resnet20 data=digits run.dir=runs/teacher
  python -m pipeline train-teacher resume=runs/teacher
  python -m pipeline train-teacher resume=runs/teacher train.epochs=+5
""",
    ),
    Command(
        "distill",
        "train a student from a teacher (or, with loss=cross_entropy, on labels alone)",
        "pipeline.stages.distill:distill",
        """\
usual keys: teacher=..., teacher.checkpoint, teacher.pool.max, student=..., loss=..., loss.temperature,
  train.epochs, train.batch_size, cluster=..., cluster.num_workers, run.dir, run.seed

examples:
  python -m pipeline distill teacher=resnet20 teacher.checkpoint=runs/teacher student=small_cnn loss=kd
  python -m pipeline distill teacher.checkpoint=runs/teacher cluster.num_workers=2 teacher.pool.max=2
  python -m pipeline distill resume=20260101-120000-digits-small_cnn-resnet20-kd-s0
""",
    ),
    Command(
        "evaluate",
        "evaluate the network that a run kept",
        "pipeline.stages.evaluate:evaluate",
        """\
usual keys: run=RUN (a run folder, or its name under runs/), evaluation.test

examples:
  python -m pipeline evaluate run=runs/student
""",
    ),
    Command(
        "predict",
        "predict the classes of your own rows with the network that a run kept",
        "pipeline.stages.predict:predict",
        """\
usual keys: run=RUN (a run folder, or its name under runs/), out=FILE.parquet, data=..., data.path (without any data
  key: the test split of the run's own data), data.on_bad_row=skip (a row that cannot be decoded gets no prediction),
  evaluation.batch_size (rows of a forward pass), cluster=inprocess (no Ray)
on Ray the network, teacher or student, runs in a pool of actors: teacher.pool.min and teacher.pool.max say how many,
  teacher.pool.num_cpus, num_gpus, accelerator_type and resources what each holds
the file has, in the order of the rows: sample_id, file and row (where the data has files), label, class_name,
  probability, probabilities (of every class)

examples:
  python -m pipeline predict run=runs/student out=predictions.parquet data=parquet data.path=/data/new.parquet
  python -m pipeline predict run=runs/student out=test.parquet cluster=inprocess
  python -m pipeline predict run=runs/teacher out=labels.parquet data=parquet data.path=/data/new teacher.pool.max=4
""",
    ),
    Command(
        "select-perturbation",
        "select PTLoss's coefficients from the teacher's validation logits, before anything is trained",
        "pipeline.stages.select_perturbation:select_perturbation",
        """\
usual keys: teacher=..., teacher.checkpoint, data=..., selection.scope=shared|group|class, selection.num_groups,
  selection.fit_temperature=true, run.dir; loss=ptloss loss.perturbation_from=auto does it at the start of distill

examples:
  python -m pipeline select-perturbation teacher=resnet20 teacher.checkpoint=runs/teacher run.dir=runs/selection
  python -m pipeline distill teacher.checkpoint=runs/teacher loss=ptloss loss.perturbation_from=runs/selection
""",
    ),
    Command(
        "search",
        "search hyper-parameters over one cache of the teacher's logits, and confirm the best over fresh seeds",
        "pipeline.stages.search:search",
        """\
usual keys: search=temperature|ptloss|cmkd|losses or search=FILE.yaml, search.num_trials, search.time_budget_s,
  search.max_concurrent, search.metric=val/top1, search.searcher=optuna|random|grid, search.scheduler=asha|median|none,
  search.confirm.top, search.confirm.seeds; all that distill takes, for what every trial has; cache.path, run.dir
what a trial holds: cluster.num_cpus_per_worker, cluster.num_gpus_per_worker (a fraction: several share a GPU)
the cache is built first where there is none; the winner is shown on test once

examples:
  python -m pipeline search search=temperature teacher.checkpoint=runs/teacher loss=kd search.num_trials=32
  python -m pipeline search search=cmkd loss=cmkd teacher.checkpoint=runs/teacher cluster.num_gpus_per_worker=0.25
  python -m pipeline search resume=runs/search search.num_trials=+16
""",
    ),
    Command(
        "search show",
        "show the trials of a search, running or finished, and its winner",
        "pipeline.stages.search_show:show",
        """\
usual keys: run=RUN (a run folder, or its name under runs/), out=FILE.csv (every trial with all its values)

examples:
  python -m pipeline search show run=runs/search
  python -m pipeline search show run=runs/search out=trials.csv
""",
    ),
    Command(
        "cache build",
        "compute the teacher's logits of every view of every training row once, and keep them",
        "pipeline.stages.cache_build:build_cache",
        """\
usual keys: teacher=..., teacher.checkpoint, teacher.pool.max, data=..., data.num_views, cache.path, cache=dense|topk,
  cache.k, cache.dtype=float16|float32; killed and run again, it computes only what is missing

examples:
  python -m pipeline cache build teacher=resnet20 teacher.checkpoint=runs/teacher cache.path=runs/cache
  python -m pipeline distill teacher=resnet20 teacher.checkpoint=runs/teacher cache.path=runs/cache \\
      teacher.source=cached
""",
    ),
    Command(
        "cache info",
        "show which caches there are, or what one of a stated size would cost",
        "pipeline.stages.cache:show_caches",
        """\
usual keys: cache.path; name=NAME (of one cache: all that its logits depend on)
plan.rows, plan.classes, plan.views: of a data set of any size; plan.teacher_rows_per_s (of one accelerator) and
  plan.samples_per_s (that training consumes)

examples:
  python -m pipeline cache info cache.path=runs/cache
  python -m pipeline cache info plan.rows=1281167 plan.classes=1000 plan.views=4 plan.teacher_rows_per_s=2500
""",
    ),
    Command(
        "cache verify",
        "check every file of a cache, and compare rows with the live teacher",
        "pipeline.stages.cache:verify_cache",
        """\
usual keys: as for `cache build`, then rows=1000 (compared with the teacher in this process; rows=all; rows=0);
  or cache.path and name=NAME: without a teacher, files only

examples:
  python -m pipeline cache verify teacher=resnet20 teacher.checkpoint=runs/teacher cache.path=runs/cache
  python -m pipeline cache verify cache.path=runs/cache name=0123456789abcdef
""",
    ),
    Command(
        "cache prune",
        "delete a cache, or what interrupted builds have left",
        "pipeline.stages.cache:prune_caches",
        """\
usual keys: cache.path, name=NAME (of the cache, or incomplete: all that are not complete)

examples:
  python -m pipeline cache prune cache.path=runs/cache name=incomplete
""",
    ),
    Command(
        "doctor",
        "check this machine: versions, folders, Ray, accelerators, tracking server",
        "pipeline.stages.doctor:doctor",
        """\
examples:
  python -m pipeline doctor
  python -m pipeline doctor tracking.uri=http://127.0.0.1:5000 cluster.address=auto
""",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 2 for what was found before work began; 1 for what failed later; 130 when interrupted.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        command, rest = _choose(arguments)
        options = _command_parser(command).parse_intermixed_args(rest)
    except SystemExit as exit_request:  # argparse has printed help or the error
        return exit_request.code if isinstance(exit_request.code, int) else EXIT_BEFORE_WORK
    request = Request(command.name, tuple(options.overrides), tuple(options.conf), options.debug)
    return _run(_load_stage(command), request)


def _run(stage: Callable[[], Callable[[Request], int]], request: Request) -> int:
    try:
        return stage()(request)
    except PipelineError as error:
        if request.debug:
            traceback.print_exc()
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = error.details.get("exit_code", EXIT_BEFORE_WORK)
        return code if isinstance(code, int) else EXIT_BEFORE_WORK
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if request.debug:
            traceback.print_exc()
        else:
            what = " ".join(str(error).split())[:500]
            print(f"unexpected {type(error).__name__}: {what}; run with --debug for the traceback", file=sys.stderr)
        return EXIT_FAILED


def _load_stage(command: Command) -> Callable[[], Callable[[Request], int]]:
    """Delays the import, which takes seconds and may fail, into the part that reports errors."""

    def load() -> Callable[[Request], int]:
        module, _, function = command.stage.partition(":")
        stage: Callable[[Request], int] = getattr(importlib.import_module(module), function)
        return stage

    return load


def _choose(arguments: Sequence[str]) -> tuple[Command, Sequence[str]]:
    """The command, whose name may be of two words, and what follows it."""
    width = max(len(command.name) for command in COMMANDS)
    listing = "\n".join(f"  {command.name:<{width}}  {command.summary}" for command in COMMANDS)
    parser = argparse.ArgumentParser(
        prog="python -m pipeline",
        usage="python -m pipeline COMMAND [group=choice] [path.to.key=value ...] [--conf DIR] [--debug]",
        description="Distils a large classifier into small ones on a Ray cluster.",
        epilog=f"commands:\n{listing}\n\n`python -m pipeline COMMAND --help` has its keys and examples.\n\n{_GROUPS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", help="one of the commands below")
    name = parser.parse_args(arguments[:1]).command
    commands = {command.name: command for command in COMMANDS}
    num_words = 1
    if len(arguments) > 1 and f"{name} {arguments[1]}" in commands:
        name, num_words = f"{name} {arguments[1]}", 2
    elif name not in commands and any(known.startswith(f"{name} ") for known in commands):
        num_words = 2
        if len(arguments) < 2 or arguments[1] in ("-h", "--help"):
            own = [
                f"  {known:<{width}}  {command.summary}"
                for known, command in commands.items()
                if known.split()[0] == name
            ]
            print("\n".join((f"usage: python -m pipeline {name} ...", "", *own)))
            raise SystemExit(0 if len(arguments) > 1 else EXIT_BEFORE_WORK)
        name = f"{name} {arguments[1]}"
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(commands)}"
        parser.error(f"unknown command {name!r}; {hint}")
    return commands[name], arguments[num_words:]


def _command_parser(command: Command) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m pipeline {command.name}",
        description=f"{command.name}: {command.summary}.",
        epilog=f"{command.details}\n{_GROUPS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="OVERRIDE",
        help="group=choice or path.to.key=value; resume=RUN goes on with a run",
    )
    parser.add_argument(
        "--conf",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="folder of your own configuration groups, before the shipped ones; may be repeated",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser
