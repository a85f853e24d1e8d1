"""The rows that a run skips (``data.on_bad_row=skip``): each counted once, the first few told, all listed in a file."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from pipeline.config.stored import write_text
from pipeline.contracts.events import Emitter, Event

FILE_NAME = "bad_rows.jsonl"
_NUM_NAMED = 3


class SkippedRows:
    """Takes events on their way to the journal, and lists the bad rows among them in ``bad_rows.jsonl``.

    A row is met again in every epoch, by any process; it is listed, and told of, once. The first few are told by
    name, further ones whenever their number has doubled, so that the record of a run stays readable.

    Args:
        folder: of the file, which may hold the rows that an earlier start met.
        journal: where events go; none: they are dropped.
    """

    def __init__(self, folder: Path, journal: Emitter | None) -> None:
        self.path = folder / FILE_NAME
        self._journal = journal
        self._lock = threading.Lock()
        self._problems = _read(self.path)

    def __len__(self) -> int:
        return len(self._problems)

    def emit(self, event: Event) -> None:
        """See ``Emitter``."""
        if "bad_rows" not in event.data:
            self._pass_on(event)
            return
        with self._lock:
            for sample_id, problem in event.data["bad_rows"].items():
                self._add(event.data["split"], int(sample_id), problem, event.time)

    def summary(self) -> str:
        """What was skipped, in a sentence; empty where nothing was."""
        if not self._problems:
            return ""
        # What is wrong without what to do about it, which the file and the warnings have.
        first = list(self._problems.values())[:_NUM_NAMED]
        named = "; ".join(problem.partition(";")[0].rstrip(".") for problem in first)
        return f"{_count(len(self))} skipped, listed in {self.path}: {named}{'; ...' if len(self) > _NUM_NAMED else ''}"

    def _add(self, split: str, sample_id: int, problem: str, time: float) -> None:
        if (split, sample_id) in self._problems:
            return
        self._problems[split, sample_id] = problem
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"split": split, "sample_id": sample_id, "problem": problem}) + "\n")
        number = len(self._problems)
        if number <= _NUM_NAMED:
            self._pass_on(Event("warning", {"message": f"skipped a row of {split}: {problem}"}, time))
        elif number & (number - 1) == 0:  # a power of two
            message = f"{_count(number)} skipped so far, listed in {self.path}"
            self._pass_on(Event("warning", {"message": message}, time))

    def _pass_on(self, event: Event) -> None:
        if self._journal is not None:
            self._journal.emit(event)


def _count(number: int) -> str:
    return "1 bad row was" if number == 1 else f"{number:,} bad rows were"


def _read(path: Path) -> dict[tuple[str, int], str]:
    """What is wrong by split and sample id. A last line that was cut off is removed: its row will be met again."""
    if not path.exists():
        return {}
    content = path.read_text(encoding="utf-8")
    whole = content[: content.rfind("\n") + 1]
    if whole != content:
        write_text(path, whole)
    rows = [json.loads(line) for line in whole.splitlines()]
    return {(row["split"], row["sample_id"]): row["problem"] for row in rows}
