"""``steady``: samples per second of a balanced pair beside a plain PyTorch loop."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.bench.measure import CpuClock, Series, ratio, say, table, verdict, write_section
from tests.bench.runs import distill, local_ray
from tests.bench.workload import PAIR, STUDENT_WIDTH, TEACHER, write_checkpoint, write_images

BATCH_SIZE = 128
TRAIN_ROWS = 5_120
WARMUP_STEPS = 20  # until the stream's buffers are as full as they stay
WINDOW_STEPS = 60
PLAIN_STEPS = 40
LOG_EVERY = 5

PLAIN = {
    "plain loop": ("--mode", "inline", "--threads", "2"),
    "plain loop, 1 loader process": ("--mode", "inline", "--threads", "2", "--loader-workers", "1"),
    "student only": ("--mode", "student", "--threads", "1"),
    "teacher only": ("--mode", "teacher", "--threads", "1"),
}


def measure(rounds: int, pool_sizes: tuple[int, ...] = (1,)) -> None:
    """Interleaved rounds of the pipeline and of each loop; writes the section."""
    rates: dict[str, Series] = {}
    cpu: dict[str, Series] = {}
    shares: dict[str, Series] = {}
    ours = {f"pipeline, {size} teacher actor{'s' * (size > 1)}": size for size in pool_sizes}
    ahead = Series()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        write_images(folder / "data", TRAIN_ROWS, BATCH_SIZE)
        checkpoint = write_checkpoint(folder / "teacher.safetensors", TEACHER)
        with local_ray(num_cpus=6, log_file=folder / "ray.log"), CpuClock() as clock, ExitStack() as stack:
            loops = {label: stack.enter_context(_PlainLoop(folder, options)) for label, options in PLAIN.items()}
            for index in range(rounds):
                for label in PLAIN:
                    with say(f"round {index + 1}: {label}"):
                        result = loops[label].measure()
                    rates.setdefault(label, Series()).add(result["samples_per_s"])
                    cpu.setdefault(label, Series()).add(1e6 * result["cpu_s_per_sample"])
                for label, size in ours.items():
                    with say(f"round {index + 1}: {label}"):
                        journal = distill(folder / "runs" / f"{index}-{size}", _overrides(folder, checkpoint, size))
                    begin, end = journal.steps[WARMUP_STEPS], journal.steps[WARMUP_STEPS + WINDOW_STEPS]
                    samples = WINDOW_STEPS * BATCH_SIZE
                    used = clock.used(begin, end)
                    rates.setdefault(label, Series()).add(samples / (end - begin))
                    cpu.setdefault(label, Series()).add(1e6 * sum(used.values()) / samples)
                    for role, seconds in used.items():
                        shares.setdefault(role, Series()).add(1e6 * seconds / samples)
                    pool = [event for event in journal.of("pool") if begin < event.time <= end]
                    ahead.add(sum(event.data["rows"] for event in pool) / samples)
    write_section("steady", _report(rates, cpu, shares, ahead, list(ours)))


class _PlainLoop(contextlib.AbstractContextManager["_PlainLoop"]):
    """A ``tests.bench.plain_loop`` that waits, without using the CPU, until it is asked to measure."""

    def __init__(self, folder: Path, options: tuple[str, ...]) -> None:
        command = [
            sys.executable, "-m", "tests.bench.plain_loop", "--data", str(folder / "data"),
            "--checkpoint", str(folder / "teacher.safetensors"), "--batch-size", str(BATCH_SIZE),
            "--steps", str(PLAIN_STEPS), *options,
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def measure(self) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        result: dict[str, float] = json.loads(self._process.stdout.readline())
        return result

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=30)


def _overrides(folder: Path, checkpoint: Path, pool_size: int) -> list[str]:
    blocks_per_epoch = TRAIN_ROWS // BATCH_SIZE
    epochs = -(-(WARMUP_STEPS + WINDOW_STEPS + 1) // blocks_per_epoch)
    return [
        "data=parquet", f"data.path={folder / 'data'}", "data.augment.crop_padding=4", "data.augment.flip=true",
        f"teacher={TEACHER}", f"teacher.checkpoint={checkpoint}", f"teacher.pool.min={pool_size}",
        "student=small_cnn", f"student.width={STUDENT_WIDTH}",
        f"train.batch_size={BATCH_SIZE}", f"train.epochs={epochs}", "train.evaluate_every=1000",
        f"train.log_every={LOG_EVERY}", "train.optimizer.lr=0.01", "evaluation.test=false",
    ]  # fmt: skip


def _report(
    rates: dict[str, Series], cpu: dict[str, Series], shares: dict[str, Series], ahead: Series, ours: list[str]
) -> str:
    inline = max((name for name in PLAIN if name.startswith("plain")), key=lambda name: rates[name].median)
    slower = min(("student only", "teacher only"), key=lambda name: rates[name].median)
    rows: list[list[str]] = []
    for name, rate in rates.items():
        mine = name in ours
        rows.append(
            [
                name,
                rate.show(),
                cpu[name].show(),
                ratio(rate, rates[inline]).show(2) if mine else "",
                ratio(rate, rates[slower]).show(2) if mine else "",
            ]
        )
    best = max(ours, key=lambda name: rates[name].median)
    against_inline, against_slower = ratio(rates[best], rates[inline]), ratio(rates[best], rates[slower])
    profile = sorted(shares.items(), key=lambda item: -item[1].median)
    return "\n\n".join(
        [
            f"{PAIR}, blocks of {BATCH_SIZE} PNG images of 32 x 32 with crop and flip. "
            "The pipeline: one Ray Train worker and the actors, one torch thread each. The plain "
            "loop: two torch threads, the teacher inline, the pipeline's own decoding and augmentation; once with "
            "decoding in the loop, once in a DataLoader process. Student only and teacher only: one thread, blocks "
            "ready in memory, no decoding. "
            f"Window of {WINDOW_STEPS} steps after {WARMUP_STEPS}. Median and range over the rounds.",
            table(("", "samples/s", "CPU us/sample, all processes", f"x {inline}", f"x {slower}"), rows),
            f"At least 1.0 x the faster plain loop: {against_inline.show(2)}, {verdict(against_inline.median >= 1)}. "
            f"At least 0.8 x min(student only, teacher only): {against_slower.show(2)}, "
            f"{verdict(against_slower.median >= 0.8)}.",
            f"Rows that left the pool in the window per row trained on: {ahead.show(2)} "
            "(below 1 the window would live on a buffer filled before it).",
            "Where the pipeline's CPU goes, us per sample:\n\n"
            + table(("", "us/sample"), [[role, value.show()] for role, value in profile if value.median >= 0.5]),
        ]
    )
