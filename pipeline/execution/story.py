"""The story of a command that has a run folder of its own, whatever it does in it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pipeline.config.load import load_config
from pipeline.config.own_code import check_code_unchanged
from pipeline.config.request import Request
from pipeline.config.rules import asks_teacher, uses_pool
from pipeline.config.runs import Run, open_run
from pipeline.config.schema import Config
from pipeline.contracts.own_code import Code
from pipeline.data import DataSource
from pipeline.errors import PipelineError, RunError
from pipeline.execution.session import RunSession, has_rest, run_interruptibly, send_rest
from pipeline.execution.teacher import CheckedTeacher, check_teacher
from pipeline.execution.ways import preflight_rows
from pipeline.execution.work import collect_own_code
from pipeline.report.tables import render_table

WorkT = TypeVar("WorkT")
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Story(Generic[WorkT]):
    """What one command does in its run folder.

    Attributes:
        check: looks at configuration and data before there is a folder.
        prepare: what is wrong shows here, before the run begins.
        carry_out: the work; ends with ``RunSession.finish``.
        show: prints the result of a finished run, and the path of ``result.json`` as the last line.
        extend: how a finished run is gone on with, for people; empty where it cannot be.
        dataset: what the tracker records of the data; none: the data set as it is.
        variants: the configurations that networks are built from; none: that of the run alone.
    """

    check: Callable[[Config, DataSource], None]
    prepare: Callable[[Run, DataSource, CheckedTeacher | None], WorkT]
    carry_out: Callable[[WorkT, RunSession], None]
    show: Callable[[Run], None]
    extend: str = ""
    dataset: Callable[[WorkT], Mapping[str, Any]] | None = None
    variants: Callable[[Config], Sequence[Config]] | None = None


def tell(story: Story[WorkT], request: Request, defaults: Sequence[str] = ()) -> int:
    """Begins the run that the request names, or goes on with it, and leaves its folder behind.

    Args:
        defaults: overrides that the command starts from.

    Returns:
        0.

    Raises:
        PipelineError: with ``exit_code`` 2 in its details before work began, 1 after.
    """
    loaded = load_config(request, defaults)
    source = loaded.config.data.open()
    story.check(loaded.config, source)
    teacher = check_teacher(loaded.config, source) if asks_teacher(loaded.config, request.command) else None
    facts = {"data": source.fingerprint, "teacher": None if teacher is None else teacher.fingerprint}

    def collect_code() -> Mapping[str, Code]:
        variants = (loaded.config,) if story.variants is None else story.variants(loaded.config)
        return collect_own_code(variants, request.command)

    with open_run(
        request.command, loaded.config, provenance=lambda: facts, code=collect_code, extends=loaded.extends
    ) as run:

        def describe(work: WorkT) -> Mapping[str, Any]:
            return _describe_dataset(source, run) if story.dataset is None else story.dataset(work)

        if run.finished:
            print("; ".join(filter(None, (f"{run.dir} is finished", story.extend, "run.dir=... makes another run"))))
            if has_rest(run):
                send_rest(run, describe(story.prepare(run, source, teacher)))
            story.show(run)
            return 0
        if run.resumed:
            _check_unchanged(run, facts)
        try:
            work = story.prepare(run, source, teacher)
            session = RunSession(run, describe(work), with_teacher=uses_pool(run.config, run.command))
        except BaseException:
            run.discard()
            raise
        _announce(run)
        try:
            run_interruptibly(lambda: _carry_out(story, work, session), session.kill)
        except Exception as error:
            explained = _explain_full_disk(error, run)
            code = session.fail(explained)
            print(run.result_path)
            if isinstance(explained, PipelineError):
                explained.details["exit_code"] = code
            if explained is error:
                raise
            raise explained from error
        story.show(run)
    return 0


def _explain_full_disk(error: Exception, run: Run) -> Exception:
    """The sentence for a disk that is full, also where that is what an error comes of; any other error as it is."""
    full: BaseException | None = error
    while full is not None and not (isinstance(full, OSError) and full.errno in _DISK_IS_FULL):
        full = None if isinstance(full, PipelineError) else full.__cause__ or full.__context__
    if not isinstance(full, OSError) or full.errno is None:
        return error
    what = full.filename or run.dir
    return RunError(
        f"{what} cannot be written ({os.strerror(full.errno)}); make room, then go on with {run.resume_command}: what "
        "the run saved before is whole"
    )


def _describe_dataset(source: DataSource, run: Run) -> dict[str, Any]:
    """What the tracker records of the data."""
    data = run.config.data
    return {
        "name": data.name,
        "fingerprint": source.fingerprint,
        "num_rows": source.split("train").num_rows,
        "path": getattr(data, "path", None) or data.name,
    }


def _carry_out(story: Story[WorkT], work: WorkT, session: RunSession) -> None:
    session.start()
    story.carry_out(work, session)


def _check_unchanged(run: Run, facts: Mapping[str, str | None]) -> None:
    """Refuses to go on with a run whose data, teacher or own modules are no longer what it began with.

    Raises:
        RunError: with both fingerprints, or the module.
    """
    recorded = run.read_provenance()
    for name, now in facts.items():
        if recorded.get(name) != now:
            raise RunError(
                f"{run.dir} began with {name} of fingerprint {recorded.get(name)}, but it now has {now}; put back what "
                "it began with, or start a new run"
            )
    check_code_unchanged(run.dir, run.config)


def _announce(run: Run) -> None:
    """How to go on with the run comes first; then who needs what."""
    print(f"run {run.name} in {run.dir}\ngo on with it: {run.resume_command}")
    print(
        render_table("preflight", ("who", "how many", "each", "in all"), preflight_rows(run.config, run.command)),
        flush=True,
    )
