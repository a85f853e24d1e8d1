"""What the sections share: CPU and memory of this process and its descendants, medians, the results file."""

from __future__ import annotations

import datetime
import os
import statistics
import subprocess
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")
SECTIONS = (
    "steady",
    "simulated",
    "epochs",
    "start",
    "memory",
    "cifar100",
    "cache-epochs",
    "cache-total",
    "cache-reading",
    "cache-cifar100",
    "losses",
    "losses-gpu",
    "cifar10h",
    "gaussian_scores",
    "selection",
    "search",
    "search-gain",
)
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")

# What a process of the tree does, by what its command line says; the first match counts.
_ROLES = (
    ("TeacherActor", "teacher"),
    ("TrainWorker", "student"),
    ("TrainController", "train controller"),
    ("SplitCoordinator", "split coordinator"),
    ("EventQueue", "event queue"),
    ("gcs_server", "Ray: GCS"),
    ("DashboardAgent", "Ray: agents"),
    ("RuntimeEnvAgent", "Ray: agents"),
    ("dashboard", "Ray: agents"),
    ("runtime_env", "Ray: agents"),
    ("monitor", "Ray: agents"),
    ("raylet/raylet", "Ray: raylet"),
    ("StatsActor", "Ray Data: statistics"),
    ("AutoscalingRequester", "Ray Data: autoscaling"),
    ("AutoscalingCoordinator", "Ray Data: autoscaling"),
    ("default_worker.py", "workers that start"),
    ("ray::", "data tasks and idle workers"),
)


@dataclass(frozen=True)
class Process:
    """One process of the tree.

    Attributes:
        role: what it does in a run ("teacher", "student", "data tasks and idle workers", ...).
        title: its command line, shortened.
    """

    pid: int
    role: str
    title: str
    cpu_s: float


def process_tree(root: int | None = None) -> list[Process]:
    """A driver, by default this process, and all that descend from it."""
    root = root or os.getpid()
    parents: dict[int, int] = {}
    cpu: dict[int, float] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                content = Path(f"/proc/{name}/stat").read_text()
            except OSError:  # it ended meanwhile
                continue
            fields = content.rpartition(")")[2].split()
            parents[int(name)] = int(fields[1])
            cpu[int(name)] = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return [
        Process(pid, role, title, cpu[pid])
        for pid in parents
        if _descends(pid, root, parents)
        for role, title in [("driver", "driver") if pid == root else _describe(pid)]
    ]


def _descends(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid > 1:
        if pid == root:
            return True
        pid = parents.get(pid, 0)
    return False


def _describe(pid: int) -> tuple[str, str]:
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        title = ""
    return next((role for text, role in _ROLES if text in title), "other"), title[:80]


def loads_torch(pid: int) -> bool:
    """Whether torch's library is mapped into a process."""
    try:
        return "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


class CpuClock:
    """Follows the CPU seconds of the tree from a thread; a process that ends keeps what it had used."""

    def __init__(self, interval_s: float = 0.5) -> None:
        self._times: list[float] = []
        self._sums: list[dict[str, float]] = []
        self._used: dict[str, float] = {}
        self._last: dict[int, float] = {}
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cpu-clock", daemon=True)

    def __enter__(self) -> CpuClock:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self._look()

    def _look(self) -> None:
        for process in process_tree():
            # What it used since the last look goes to what it is now: Ray's workers change their title.
            used = process.cpu_s - self._last.get(process.pid, 0.0)
            self._last[process.pid] = process.cpu_s
            self._used[process.role] = self._used.get(process.role, 0.0) + used
        self._times.append(time.time())
        self._sums.append(dict(self._used))

    def used(self, begin: float, end: float) -> dict[str, float]:
        """CPU seconds by role between two times (seconds since the epoch), interpolated between looks."""
        at_end, at_begin = self._at(end), self._at(begin)
        return {role: value - at_begin.get(role, 0.0) for role, value in at_end.items()}

    def _at(self, moment: float) -> dict[str, float]:
        right = min(max(bisect_right(self._times, moment), 1), len(self._times) - 1)
        left = right - 1
        span = self._times[right] - self._times[left]
        share = min(max((moment - self._times[left]) / span, 0.0), 1.0) if span > 0 else 1.0
        before, after = self._sums[left], self._sums[right]
        return {role: before.get(role, 0.0) + share * (after[role] - before.get(role, 0.0)) for role in after}


def time_command(arguments: Sequence[str], output: Path, text: str = "") -> tuple[float, float]:
    """Carries out a command to its end.

    Args:
        arguments: after ``python -m``.
        output: file that what it prints is added to.
        text: its standard input.

    Returns:
        Wall seconds, and CPU seconds of all its processes.
    """
    # What a process does between the last look and its end is lost, so there are more looks than for long runs.
    with CpuClock(interval_s=0.2) as clock, output.open("a") as file:
        began = time.time()
        code = subprocess.run(
            [sys.executable, "-m", *arguments], input=text, text=True, stdout=file, stderr=file, check=False
        ).returncode
        ended = time.time()
    if code:  # the file may be a temporary one
        last = "\n".join(output.read_text().splitlines()[-10:])
        raise SystemExit(f"python -m {' '.join(arguments)} ended with {code}:\n{last}")
    return ended - began, sum(clock.used(began, ended).values())


def memory_of(pid: int) -> int | None:
    """A process's own memory in bytes: its share of anonymous and file pages (PSS), without shared memory,

    which is the object store and is counted there; none for a process that has ended.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:] if line.endswith("kB")}
    return values["Pss_Anon"] + values["Pss_File"]


@dataclass
class Series:
    """Repeated measurements of one thing."""

    values: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        self.values.append(value)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def show(self, digits: int = 0) -> str:
        """``median (lowest to highest)``."""
        if not self.values:
            return "-"
        low, high = min(self.values), max(self.values)
        return f"{self.median:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def ratio(ours: Series, other: Series) -> Series:
    """Round by round."""
    return Series([a / b for a, b in zip(ours.values, other.values, strict=True)])


def verdict(reached: bool) -> str:
    return "reached" if reached else "MISSED"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, which is also what is printed."""
    body = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[index]) for line in [list(columns), *body]) for index in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(columns), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, body)])


def write_section(name: str, text: str, complete: bool = True) -> None:
    """Puts a section into the results file, in place of what it said before, and prints it when it is complete."""
    heading = f"## {name}\n"
    content = f"{heading}\n{_origin()}\n\n{text.strip()}\n"
    if complete:
        print(content, flush=True)
    header, found = _read_results()
    found[name] = content
    parts = [header.strip() + "\n", *(found[section] for section in SECTIONS if section in found)]
    temporary = RESULTS.with_suffix(".part")
    temporary.write_text("\n".join(parts), encoding="utf-8")
    os.replace(temporary, RESULTS)


def _read_results() -> tuple[str, dict[str, str]]:
    header, *rest = RESULTS.read_text(encoding="utf-8").split("\n## ")
    return header, {part.split("\n")[0]: f"## {part.rstrip()}\n" for part in rest}


def _origin() -> str:
    command = " ".join([f"python -m tests.bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    load = os.getloadavg()[0]
    return (
        f"`{command}`, commit {_commit()}, {datetime.date.today().isoformat()}, {_machine()}. "
        f"Load average at the end: {load:.1f}."
    )


def _commit() -> str:
    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return result.stdout.strip()

    changed = git("status", "--porcelain", "--", "pipeline", "conf")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with local changes" if changed else "")


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores of {model}, {memory:.0f} GiB, no GPU used"


@contextmanager
def say(what: str) -> Iterator[None]:
    """Tells on stderr what is being measured, and how long it took."""
    began = time.monotonic()
    print(f"  {what} ...", file=sys.stderr, end="", flush=True)
    yield
    print(f" {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
