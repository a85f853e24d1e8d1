"""``epochs``: the pause at an epoch's border beside an ordinary step."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from tests.bench.measure import Series, say, table, verdict, write_section
from tests.bench.runs import Journal, distill, local_ray
from tests.bench.workload import PAIR, STUDENT_WIDTH, TEACHER, write_checkpoint, write_images

BATCH_SIZE = 64
BLOCKS_PER_EPOCH = 25
EPOCHS_PER_ROUND = 8


def measure(rounds: int) -> None:
    """One run; every other epoch ends without validation and checkpoint. Writes the section."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        write_images(folder / "data", BLOCKS_PER_EPOCH * BATCH_SIZE, 2 * BATCH_SIZE)
        checkpoint = write_checkpoint(folder / "teacher.safetensors", TEACHER)
        epochs = EPOCHS_PER_ROUND * rounds
        with local_ray(4, folder / "ray.log"), say(f"{epochs} epochs"):
            journal = distill(folder / "runs" / "epochs", _overrides(folder, checkpoint, epochs))
    write_section("epochs", _report(journal, epochs))


def _overrides(folder: Path, checkpoint: Path, epochs: int) -> list[str]:
    return [
        "data=parquet", f"data.path={folder / 'data'}", "data.augment.crop_padding=4", "data.augment.flip=true",
        f"teacher={TEACHER}", f"teacher.checkpoint={checkpoint}", "student=small_cnn", f"student.width={STUDENT_WIDTH}",
        f"train.batch_size={BATCH_SIZE}", f"train.epochs={epochs}", "train.evaluate_every=2", "train.log_every=1",
        "train.optimizer.lr=0.01", "evaluation.test=false",
    ]  # fmt: skip


def _report(journal: Journal, epochs: int) -> str:
    times = journal.steps
    validated = {event.data["step"]: event.time for event in journal.of("evaluation")}
    ordinary, plain_borders, evaluated_borders = Series(), Series(), Series()
    for step in range(BLOCKS_PER_EPOCH + 1, max(times)):
        gap = times[step] - times[step - 1]
        if (step - 1) % BLOCKS_PER_EPOCH:
            ordinary.add(1e3 * gap)
        elif step - 1 in validated:
            # From the end of validation: writing and committing the checkpoint, then the step.
            evaluated_borders.add(1e3 * (times[step] - validated[step - 1]))
        else:
            plain_borders.add(1e3 * gap)
    worst = max(*plain_borders.values, *evaluated_borders.values) / ordinary.median
    high = statistics.quantiles(ordinary.values, n=100)[98]
    rows = [
        ["within an epoch", len(ordinary.values), ordinary.show(), f"{high:,.0f}"],
        ["border without validation", len(plain_borders.values), plain_borders.show(), ""],
        ["border, after validation, with a checkpoint", len(evaluated_borders.values), evaluated_borders.show(), ""],
    ]
    return "\n\n".join(
        [
            f"{PAIR}, one worker and one actor, {epochs} epochs of {BLOCKS_PER_EPOCH} blocks of {BATCH_SIZE} rows "
            "in one run; the first epoch is left out. Milliseconds from step to step, median and range. "
            "At every other border there is validation and a checkpoint; its gap counts from the end of validation.",
            table(("gap", "how many", "ms", "99th percentile"), rows),
            f"The longest gap at a border is {worst:.1f} ordinary steps (at most 3): {verdict(worst <= 3)}.",
        ]
    )
