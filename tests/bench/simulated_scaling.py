"""``simulated``: how the dedicated pool scales when teachers and students do not use the CPU."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

from tests.bench.measure import CpuClock, Series, say, table, verdict, write_section
from tests.bench.runs import distill, local_ray
from tests.bench.workload import write_checkpoint, write_images

TEACHER_WAIT_S = 0.8  # a block
STUDENT_WAIT_S = 0.4  # a block
BATCH_SIZE = 64
BLOCKS_PER_EPOCH = 8
# (teachers, students): the corners, and the pairs where both sides are equally fast, which is hardest. A run of the
# largest takes two minutes on two cores, nearly all of it for starting processes.
GRID = ((1, 1), (2, 1), (8, 1), (4, 2), (1, 4), (8, 4))
TEACHERS, STUDENTS = (1, 2, 4, 8), (1, 2, 4)
WARMUP_S, WINDOW_S, NUM_WINDOWS = 6.0, 15.0, 5
FACTORY = "tests.bench.simulated"


def measure(rounds: int, grid: tuple[tuple[int, int], ...] | None = None) -> None:
    """One run for each pair of pool size and number of workers; writes the section.

    Args:
        rounds: runs of each pair.
        grid: (teachers, students) to measure; none: ``GRID``.
    """
    pairs = grid or GRID
    rates: dict[tuple[int, int], Series] = {pair: Series() for pair in pairs}
    cpu_ms: dict[tuple[int, int], Series] = {pair: Series() for pair in pairs}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        write_images(folder / "data", BLOCKS_PER_EPOCH * BATCH_SIZE, 16, encoding="raw")
        checkpoint = write_checkpoint(
            folder / "teacher.safetensors",
            "custom", factory=f"{FACTORY}:build_teacher", kwargs={"wait_s": 0.0},
        )  # fmt: skip
        accelerators = {"teacher_accelerator": float(max(TEACHERS)), "student_accelerator": float(max(STUDENTS))}
        with local_ray(4, folder / "ray.log", accelerators), CpuClock() as clock:
            for index in range(rounds):
                for teachers, students in pairs:
                    with say(f"round {index + 1}: {teachers} teachers, {students} students"):
                        run_dir = folder / "runs" / f"{index}-{teachers}-{students}"
                        journal = distill(run_dir, _overrides(folder, checkpoint, teachers, students))
                    times = journal.steps
                    first, last = _window(teachers, students, max(times))
                    for begin, end in _cut(first, last):
                        seconds = times[end] - times[begin]
                        rates[teachers, students].add((end - begin) * students / seconds)
                    used = sum(clock.used(times[first], times[last]).values())
                    cpu_ms[teachers, students].add(1e3 * used / ((last - first) * students))
                    measured = {pair: rate for pair, rate in rates.items() if rate.values}
                    # A run takes minutes: what is measured is kept whatever happens to the next.
                    complete = index == rounds - 1 and (teachers, students) == pairs[-1]
                    write_section("simulated", _report(measured, cpu_ms), complete)


def expected_rate(teachers: int, students: int) -> float:
    """Blocks per second of the slower side."""
    return min(students / STUDENT_WAIT_S, teachers / TEACHER_WAIT_S)


def _num_epochs(teachers: int, students: int) -> int:
    blocks = expected_rate(teachers, students) * (WARMUP_S + WINDOW_S)
    return -(-round(blocks) // BLOCKS_PER_EPOCH) + 1


def _window(teachers: int, students: int, last: int) -> tuple[int, int]:
    first = max(1, round(expected_rate(teachers, students) * WARMUP_S / students))
    # The last step stands before the only evaluation and is left out with it.
    return first, last - 1


def _cut(first: int, last: int) -> list[tuple[int, int]]:
    marks = [first + (last - first) * part // NUM_WINDOWS for part in range(NUM_WINDOWS + 1)]
    return [(begin, end) for begin, end in itertools.pairwise(marks) if end > begin]


def _overrides(folder: Path, checkpoint: Path, teachers: int, students: int) -> list[str]:
    return [
        "data=parquet", f"data.path={folder / 'data'}", "data.image_size=[32,32]", "loss=kd",
        "teacher=custom", f"teacher.factory={FACTORY}:build_teacher", f"teacher.kwargs={{wait_s:{TEACHER_WAIT_S}}}",
        f"teacher.checkpoint={checkpoint}", f"teacher.pool.min={teachers}", "teacher.pool.num_cpus=0",
        "teacher.pool.resources={teacher_accelerator:1}",
        "student=custom", f"student.factory={FACTORY}:build_student", f"student.kwargs={{wait_s:{STUDENT_WAIT_S}}}",
        f"cluster.num_workers={students}", "cluster.num_cpus_per_worker=0.25",
        "cluster.resources_per_worker={student_accelerator:1}",
        f"train.batch_size={BATCH_SIZE}", f"train.epochs={_num_epochs(teachers, students)}",
        "train.evaluate_every=1000", "train.log_every=1", "train.optimizer.lr=0.001", "evaluation.test=false",
    ]  # fmt: skip


def _report(rates: dict[tuple[int, int], Series], cpu_ms: dict[tuple[int, int], Series]) -> str:
    rows, reached = [], True
    for (teachers, students), rate in rates.items():
        expected = expected_rate(teachers, students)
        share = rate.median / expected
        reached = reached and abs(share - 1) <= 0.1
        rows.append(
            [
                teachers,
                students,
                f"{expected:.2f}",
                rate.show(2),
                f"{share:.3f}",
                cpu_ms[teachers, students].show(),
            ]
        )
    top = max(expected_rate(*pair) for pair in rates)
    return "\n\n".join(
        [
            f"A teacher waits {TEACHER_WAIT_S * 1e3:.0f} ms a block, a student {STUDENT_WAIT_S * 1e3:.0f} ms, neither "
            "using the CPU; each holds one custom resource. "
            f"Blocks of {BATCH_SIZE} raw 32 x 32 images (196 kB). "
            f"Expected: min(students / {STUDENT_WAIT_S} s, teachers / {TEACHER_WAIT_S} s). "
            f"Median and range over {NUM_WINDOWS} windows of about {WINDOW_S / NUM_WINDOWS:.0f} s of a run; CPU of all "
            "processes, the network's own included.",
            table(("teachers", "students", "expected blocks/s", "blocks/s", "of expected", "CPU ms/block"), rows),
            f"Within 10 % everywhere, up to {top:g} blocks/s: {verdict(reached)}.",
        ]
    )
