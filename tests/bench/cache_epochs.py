"""``epochs``: cached epochs beside the student alone in the same pipeline, and beside a plain loop."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from tests.bench.measure import CpuClock, Series, ratio, say, table, verdict, write_section
from tests.bench.runs import Journal, distill, local_ray
from tests.bench.workload import PAIR, STUDENT_WIDTH, TEACHER, write_checkpoint, write_images

BATCH_SIZE = 128
TRAIN_ROWS = 5_120
NUM_VIEWS = 4
THREADS = 2  # of torch, wherever a student is trained
WARMUP_STEPS = 20  # until the stream's buffers are as full as they stay
WINDOW_STEPS = 60
LOG_EVERY = 5

# A Ray of its own even where the benchmark has started none: one that happens to run here must not be joined.
CLUSTERS = {
    "inprocess": ("cluster=inprocess", f"train.num_threads={THREADS}"),
    "ray": ("cluster=ray", "cluster.address=local", f"cluster.num_cpus_per_worker={THREADS}"),
}
PLAIN = "plain loop, logits in memory"


def measure(
    rounds: int, rows: int = TRAIN_ROWS, steps: int = WINDOW_STEPS, clusters: Sequence[str] = tuple(CLUSTERS)
) -> None:
    """Interleaved rounds of the plain loop and of both runs of each way; writes the section."""
    rates: dict[str, Series] = {}
    cpu: dict[str, Series] = {}
    asked = 0
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        write_images(folder / "data", rows, BATCH_SIZE)
        write_checkpoint(folder / "teacher.safetensors", TEACHER)
        kinds = {"student only": ["loss=cross_entropy"], "cached": [*_teacher(folder), "teacher.source=cached"]}
        ray = local_ray(num_cpus=6, log_file=folder / "ray.log") if "ray" in clusters else contextlib.nullcontext()
        with (
            ray,
            CpuClock() as clock,
            ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process,
        ):
            with say("cache build"):
                _build(folder)
            for index in range(rounds):
                with say(f"round {index + 1}: {PLAIN}"):
                    rate, seconds = process.submit(train_plainly, folder / "data", NUM_VIEWS, steps).result()
                rates.setdefault(PLAIN, Series()).add(rate)
                cpu.setdefault(PLAIN, Series()).add(1e6 * seconds)
                for cluster in clusters:
                    for kind, overrides in kinds.items():
                        label = f"{kind}, {cluster}"
                        run_dir = folder / "runs" / f"{index}-{cluster}-{kind.replace(' ', '-')}"
                        settings = [*_settings(folder, rows, steps), *CLUSTERS[cluster], *overrides]
                        with say(f"round {index + 1}: {label}"):
                            journal = distill(run_dir, settings)
                        begin, end = journal.steps[WARMUP_STEPS], journal.steps[WARMUP_STEPS + steps]
                        used = clock.used(begin, end)
                        # Without Ray all is in this process; the Ray that waits beside it is no part of that.
                        seconds = used["driver"] if cluster == "inprocess" else sum(used.values())
                        rates.setdefault(label, Series()).add(steps * BATCH_SIZE / (end - begin))
                        cpu.setdefault(label, Series()).add(1e6 * seconds / (steps * BATCH_SIZE))
                        asked += _count_asked(journal)
    write_section("cache-epochs", _report(rates, cpu, asked, clusters, steps))


def train_plainly(
    data: Path, num_views: int, steps: int, warmup: int = 4, threads: int = THREADS
) -> tuple[float, float]:
    """A plain PyTorch loop that has the teacher's logits of every view in memory, for a process of its own.

    Rows are read, decoded and augmented in the loop, by the same code as in the pipeline.

    Returns:
        Samples per second, and CPU seconds of a sample.
    """
    import torch

    from pipeline.contracts.columns import INPUT, LABEL, SAMPLE_ID
    from pipeline.data import AugmentParams, BlockPlanner, EpochOrder, decode_block, read_blocks
    from pipeline.data.sources.parquet import ParquetParams
    from pipeline.losses.kd import kl_divergence
    from pipeline.models import MODELS, build_classifier

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    params = ParquetParams(path=str(data), augment=AugmentParams(crop_padding=4, flip=True))
    source = params.open()
    reader, decoder = source.load("train"), source.decoder("train")
    planner = BlockPlanner(EpochOrder(reader, 0, None), reader.num_rows, BATCH_SIZE, num_views)
    values = {"name": "small_cnn", "width": STUDENT_WIDTH}
    student = build_classifier(MODELS.entries()["small_cnn"].model_validate(values), source.spec).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    logits = torch.randn(num_views, reader.num_rows, source.spec.num_classes)  # what they say takes no time
    began = cpu_began = 0.0
    for step in range(warmup + steps):
        if step == warmup:
            began, cpu_began = time.perf_counter(), time.process_time()
        plan = planner.block(step)
        rows = decode_block(read_blocks(reader, [plan]), decoder, params.augment, seed=0)
        inputs, labels, sample_ids = (torch.from_numpy(rows[name]) for name in (INPUT, LABEL, SAMPLE_ID))
        student_logits = student(inputs)
        loss = 0.9 * kl_divergence(student_logits, logits[plan.view, sample_ids], temperature=4.0)
        loss = loss + 0.1 * torch.nn.functional.cross_entropy(student_logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()  # a user would log it
    samples = steps * BATCH_SIZE
    return samples / (time.perf_counter() - began), (time.process_time() - cpu_began) / samples


def data_settings(data: Path, num_views: int) -> list[str]:
    """The images of ``write_images``, augmented in so many views."""
    return [
        "data=parquet", f"data.path={data}", "data.augment.crop_padding=4", "data.augment.flip=true",
        f"data.num_views={num_views}", f"train.batch_size={BATCH_SIZE}",
    ]  # fmt: skip


def _teacher(folder: Path) -> list[str]:
    checkpoint = folder / "teacher.safetensors"
    return [f"teacher={TEACHER}", f"teacher.checkpoint={checkpoint}", f"cache.path={folder / 'cache'}"]


def _settings(folder: Path, rows: int, steps: int) -> list[str]:
    epochs = -(-(WARMUP_STEPS + steps + 1) // (rows // BATCH_SIZE))
    return [
        *data_settings(folder / "data", NUM_VIEWS), "student=small_cnn", f"student.width={STUDENT_WIDTH}",
        f"train.epochs={epochs}", "train.evaluate_every=1000", f"train.log_every={LOG_EVERY}",
        "train.optimizer.lr=0.01", "evaluation.test=false",
    ]  # fmt: skip


def _build(folder: Path) -> None:
    from pipeline.config.request import Request
    from pipeline.stages.cache_build import build_cache

    settings = [*data_settings(folder / "data", NUM_VIEWS), *_teacher(folder), "cluster=inprocess"]
    (folder / "runs").mkdir()
    with (folder / "runs" / "build.txt").open("w") as file, contextlib.redirect_stdout(file):
        build_cache(Request("cache build", (*settings, f"run.dir={folder / 'runs' / 'build'}")))


def _count_asked(journal: Journal) -> int:
    """Rows that a pool computed once training had begun."""
    began = journal.stage_started("training")
    return sum(event.data["rows"] for event in journal.of("pool") if event.time > began)


def _report(rates: dict[str, Series], cpu: dict[str, Series], asked: int, clusters: Sequence[str], steps: int) -> str:
    rows: list[list[str]] = []
    verdicts = []
    for label, rate in rates.items():
        kind, _, cluster = label.partition(", ")
        of_student = ratio(rate, rates[f"student only, {cluster}"]) if kind == "cached" else None
        of_plain = "" if label == PLAIN else ratio(rate, rates[PLAIN]).show(2)
        shown = "" if of_student is None else of_student.show(2)
        rows.append([label, rate.show(), cpu[label].show(), shown, of_plain])
        if of_student is not None:
            verdicts.append(f"{cluster} {shown}, {verdict(of_student.median >= 0.9)}")
    return "\n\n".join(
        [
            f"{PAIR}, blocks of {BATCH_SIZE} PNG images of 32 x 32 with crop and flip in {NUM_VIEWS} views. Student "
            f"only: `loss=cross_entropy`, no teacher. Cached: `loss=kd teacher.source=cached`, dense in float16. In "
            f"process, or one Ray Train worker; {THREADS} torch threads for the student everywhere. The plain loop "
            "reads, decodes and augments by the pipeline's own code, and takes the logits out of a tensor. "
            f"Window of {steps} steps after {WARMUP_STEPS}, borders of epochs included. Median and range over the "
            "rounds.",
            table(("", "samples/s", "CPU us/sample, all processes", "x student only", f"x {PLAIN}"), rows),
            f"Cached epochs at least 0.9 x student only: {'; '.join(verdicts)}.",
            f"Rows that a teacher computed during training: {asked:,}.",
        ]
    )
