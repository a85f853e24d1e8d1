"""What the live view knows of a run, put together from its events."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from pipeline.contracts.events import Event

WAITING_SHARE = 0.15  # above this share of the wall time, the student waits for what feeds it
_RECENT_S = 60.0
_NUM_WARNINGS_SHOWN = 3


_TEACHER_STAGES = ("logits", "teacher logits")


@dataclass
class TrialsState:
    """The trials of a search, and what the teacher took of its time.

    Attributes:
        phase: ``search`` or ``confirm``; empty: this run is no search.
        best: the event of the best trial of the phase so far.
        pauses: whether trials of this phase wait for each other, so that those that are over say nothing of the rest.
    """

    phase: str = ""
    num_done: int = 0
    num_trials: int = 0
    states: dict[str, str] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    pauses: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    teacher_s: float = 0.0
    _began: float = 0.0
    _done_at_begin: int = 0
    _teacher_began: dict[str, float] = field(default_factory=dict)

    def note_stage(self, name: str, begins: bool, time: float) -> None:
        if name not in _TEACHER_STAGES:
            return
        if begins:
            self._teacher_began[name] = time
        elif name in self._teacher_began:
            self.teacher_s += time - self._teacher_began.pop(name)

    def update(self, event: Event) -> None:
        data = event.data
        if data["phase"] != self.phase:
            self.phase, self.states, self.best, self.pauses = data["phase"], {}, None, False
            self._began, self._done_at_begin = event.time, data["num_done"]
        self.num_done, self.num_trials = data["num_done"], data["num_trials"]
        self.states[data["label"]] = data["state"]
        self.seconds[data["label"]] = data["seconds"]
        self.pauses |= data["state"] == "paused"
        if data.get("best"):
            self.best = data

    def time_left_s(self, now: float) -> float | None:
        """As if the rest took as long as those that are done; none before one is, or where they wait for each other."""
        done = self.num_done - self._done_at_begin
        if done <= 0 or self.pauses:
            return None
        return (now - self._began) / done * (self.num_trials - self.num_done)

    def count(self) -> str:
        """``4 of 16 done, 1 pruned, 2 running``."""
        states = list(self.states.values())
        parts = [f"{self.num_done} of {self.num_trials} done"]
        shown = [state for state in ("pruned", "failed", "paused", "running") if state in states]
        parts += [f"{states.count(state)} {state}" for state in shown]
        return ", ".join(parts)

    @property
    def teacher_share(self) -> float | None:
        """Of the time of teacher and trials together; none before a trial was."""
        trials = sum(self.seconds.values())
        return self.teacher_s / (self.teacher_s + trials) if trials else None


@dataclass
class RunState:
    """Filled by ``update``; everything may be missing, for events come in any order and some never.

    Attributes:
        with_teacher: whether waiting for data means waiting for the teacher.
        waits: when there last was a line about each service outside that is waited for, and the line.
    """

    with_teacher: bool
    status: str = ""
    stage: str = ""
    stage_detail: str = ""
    num_epochs: int | None = None
    num_steps: int | None = None
    steps_per_epoch: int | None = None
    step: int = 0
    epoch: int = 0
    samples_per_s: float | None = None
    rows: tuple[int, int] | None = None
    data_wait: float | None = None
    losses: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    actors: dict[str, tuple[float, dict[str, Any]]] = field(default_factory=dict)
    warnings: deque[str] = field(default_factory=lambda: deque(maxlen=_NUM_WARNINGS_SHOWN))
    num_warnings: int = 0
    waits: dict[str, tuple[float, str]] = field(default_factory=dict)
    now: float = 0.0
    trials: TrialsState = field(default_factory=lambda: TrialsState())
    _recent: deque[tuple[float, int]] = field(default_factory=deque)

    def update(self, event: Event) -> None:
        self.now = max(self.now, event.time)
        if update := getattr(self, f"_update_{event.kind}", None):
            update(event)

    @property
    def time_left_s(self) -> float | None:
        """From the rate of the last minute; None before there is one."""
        if self.trials.phase:
            return self.trials.time_left_s(self.now)
        if self.rows is not None:
            done, total = self.rows
            return (total - done) / self.samples_per_s if self.samples_per_s else None
        if self.num_steps is None or len(self._recent) < 2:
            return None
        (start, first), (end, last) = self._recent[0], self._recent[-1]
        if end <= start or last <= first:
            return None
        return max(0, self.num_steps - last) * (end - start) / (last - first)

    @property
    def bottleneck(self) -> str:
        """Who waits for whom, or nothing before it is known."""
        if self.data_wait is None:
            return ""
        if self.data_wait <= WAITING_SHARE:
            return "student-bound"
        name = "teacher-bound" if self.with_teacher else "input-bound"
        return f"{name} (student waits {self.data_wait:.0%})".replace("%", " %")

    @property
    def waiting(self) -> str:
        """What was waited for in the last minute; a process that is lost cannot tell that it no longer does."""
        return "; ".join(message for time, message in self.waits.values() if time > self.now - _RECENT_S)

    @property
    def pool(self) -> str:
        """The teacher's actors that were heard of in the last minute."""
        actors = [data for time, data in self.actors.values() if time > self.now - _RECENT_S]
        if not actors:
            return ""
        parts = [f"{len(actors)} actor" + "s" * (len(actors) != 1)]
        if rates := [data["rows_per_s"] for data in actors if data.get("rows_per_s") is not None]:
            parts.append(f"{sum(rates):,.0f} rows/s")
        if shares := [data["busy"] for data in actors if data.get("busy") is not None]:
            parts.append(f"{100 * sum(shares) / len(shares):.0f} % busy")
        return ", ".join(parts)

    def _update_status(self, event: Event) -> None:
        self.status = str(event.data.get("status", ""))

    def _update_stage(self, event: Event) -> None:
        name, state = str(event.data.get("name", "")), event.data.get("state")
        self.trials.note_stage(name, state == "started", event.time)
        if state == "started":
            self.stage, self.stage_detail = name, str(event.data.get("detail") or "")
        elif name == self.stage:
            self.stage, self.stage_detail = f"{name}: done", ""

    def _update_plan(self, event: Event) -> None:
        self.num_epochs = event.data.get("num_epochs", self.num_epochs)
        self.num_steps = event.data.get("num_steps", self.num_steps)
        self.steps_per_epoch = event.data.get("steps_per_epoch", self.steps_per_epoch)
        self.step = event.data.get("start_step") or 0
        self._recent.clear()

    def _update_rows(self, event: Event) -> None:
        self.rows = (event.data["done"], event.data["total"])
        self.samples_per_s = event.data.get("rows_per_s", self.samples_per_s)

    def _update_step(self, event: Event) -> None:
        data = event.data
        self.step = data.get("step", self.step)
        self.epoch = data.get("epoch", self.epoch)
        self.samples_per_s = data.get("samples_per_s", self.samples_per_s)
        self.data_wait = data.get("data_wait", self.data_wait)
        self.losses = dict(data.get("metrics") or self.losses)
        self._recent.append((event.time, self.step))
        while len(self._recent) > 2 and self._recent[0][0] < event.time - _RECENT_S:
            self._recent.popleft()

    def _update_evaluation(self, event: Event) -> None:
        self.evaluation = event.data
        if event.data.get("best"):
            self.best = event.data

    def _update_trial(self, event: Event) -> None:
        self.rows = None
        self.trials.update(event)

    def _update_pool(self, event: Event) -> None:
        self.actors[str(event.data.get("actor", ""))] = (event.time, event.data)

    def _update_wait(self, event: Event) -> None:
        name = str(event.data.get("name", ""))
        if event.data.get("waiting"):
            self.waits[name] = (event.time, str(event.data.get("message", "")))
        else:
            self.waits.pop(name, None)

    def _update_warning(self, event: Event) -> None:
        self.num_warnings += 1
        self.warnings.append(str(event.data.get("message", "")))
