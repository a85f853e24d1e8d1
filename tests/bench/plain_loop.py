"""What is compared with: a plain PyTorch loop, in a process of its own.

    python -m tests.bench.plain_loop --data DIR --checkpoint FILE --mode inline --threads 2

Modes: ``inline`` reads, decodes, augments, asks the teacher and trains, one after the other (decoding
in a process of its own with ``--loader-workers 1``); ``student`` trains on blocks that are ready in
memory; ``teacher`` runs its forward pass on such blocks. Each line on standard input starts a
measurement, which answers with one line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from pipeline.contracts.columns import INPUT, LABEL
from pipeline.data import AugmentParams, EpochOrder, decode_block, read_blocks
from pipeline.data.order.epochs import BlockPlanner
from pipeline.data.sources.parquet import ParquetParams
from pipeline.losses.kd import kl_divergence
from pipeline.models import MODELS, build_classifier, load_weights
from tests.bench.workload import STUDENT_WIDTH, TEACHER


class Blocks(IterableDataset[Any]):
    """Batches without end, shuffled by epoch; decoded and augmented by the same code as in the pipeline."""

    def __init__(self, params: ParquetParams, batch_size: int) -> None:
        source = params.open()
        self._reader, self._decoder, self._augment = source.load("train"), source.decoder("train"), params.augment
        self._planner = BlockPlanner(EpochOrder(self._reader, 0, None), self._reader.num_rows, batch_size, None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for position in itertools.count():
            table = read_blocks(self._reader, [self._planner.block(position)])
            rows = decode_block(table, self._decoder, self._augment, seed=0)
            yield {name: torch.from_numpy(rows[name]) for name in (INPUT, LABEL)}


def main() -> None:
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    params = ParquetParams(path=arguments.data, augment=AugmentParams(crop_padding=4, flip=True))
    spec = params.open().spec
    entries = MODELS.entries()
    teacher = build_classifier(entries[arguments.teacher].model_validate({"name": arguments.teacher}), spec)
    load_weights(teacher.network, arguments.checkpoint)
    teacher.eval().requires_grad_(False)
    student_values = {"name": "small_cnn", "width": arguments.student_width}
    student = build_classifier(entries["small_cnn"].model_validate(student_values), spec).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(Blocks(params, arguments.batch_size), batch_size=None, num_workers=arguments.loader_workers)
    batches: Iterator[dict[str, torch.Tensor]] = iter(loader)
    if arguments.mode != "inline":
        ready = [next(batches) for _ in range(4)]
        with torch.inference_mode():
            logits = teacher(ready[0][INPUT]).clone()
        batches = itertools.cycle(ready)

    def ask(inputs: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return teacher(inputs)

    def train(batch: dict[str, torch.Tensor], teacher_logits: torch.Tensor) -> None:
        student_logits = student(batch[INPUT])
        loss = 0.9 * kl_divergence(student_logits, teacher_logits, temperature=4.0)
        loss = loss + 0.1 * torch.nn.functional.cross_entropy(student_logits, batch[LABEL])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()  # a user would log it

    for _line in sys.stdin:
        for step in range(arguments.warmup + arguments.steps):
            if step == arguments.warmup:
                began, cpu_s = time.perf_counter(), _cpu_s()
            batch = next(batches)
            if arguments.mode == "teacher":
                ask(batch[INPUT])
            else:
                train(batch, (logits if arguments.mode == "student" else ask(batch[INPUT])).clone())
        samples = arguments.steps * arguments.batch_size
        figures = {
            "samples_per_s": samples / (time.perf_counter() - began),
            "cpu_s_per_sample": (_cpu_s() - cpu_s) / samples,
        }
        print(json.dumps(figures), flush=True)


def _cpu_s() -> float:
    """CPU seconds so far of this process and of a loader's worker, which is still running."""
    import psutil

    usage = resource.getrusage(resource.RUSAGE_SELF)
    children = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return usage.ru_utime + usage.ru_stime + sum(times.user + times.system for times in children)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of write_images")
    parser.add_argument("--checkpoint", required=True, help="the teacher's weights")
    parser.add_argument("--mode", choices=("inline", "student", "teacher"), default="inline")
    parser.add_argument("--threads", type=int, default=1, help="torch's CPU threads")
    parser.add_argument("--loader-workers", type=int, default=0, help="processes that decode")
    parser.add_argument("--teacher", default=TEACHER)
    parser.add_argument("--student-width", type=int, default=STUDENT_WIDTH)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--warmup", type=int, default=4, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=40, help="steps that are timed")
    return parser.parse_args()


if __name__ == "__main__":
    main()
