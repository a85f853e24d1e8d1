"""Time of the losses, forward and backward, against distillation by plain autograd.

    python -m tests.bench.losses [--device cuda] [--rounds 5] [--threads 1]

For each size the losses take turns, round by round. It replaces its part of tests/bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.losses import LossParams, Objective, Signals
from pipeline.losses.cmkd import CMKDParams
from pipeline.losses.dist import DISTParams
from pipeline.losses.dkd import DKDParams
from pipeline.losses.kd import KDParams
from pipeline.losses.ptloss import PTLossParams
from pipeline.losses.soft_rank import soft_rank
from tests.bench.measure import Series, ratio, say, table, verdict, write_section

SIZES = ((1024, 100), (1024, 1000), (256, 10_000))
LOSSES: dict[str, tuple[LossParams, float | None]] = {
    "kd": (KDParams(ce_weight=0), None),
    "ptloss, order 5": (PTLossParams(perturbation=(0.5, -0.25, 0.1, 0.1, 0.1), temperature=4.0), 1.3),
    "dist, inter": (DISTParams(ce_weight=0, intra_weight=0), None),
    "dist": (DISTParams(ce_weight=0), 1.2),
    "cmkd": (CMKDParams(ce_weight=0), 6.0),
    "dkd": (DKDParams(ce_weight=0), None),
}
SOFT_RANK_LIMIT = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.losses",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    rows: list[list[str]] = []
    for batch, classes in SIZES:
        with say(f"{batch} x {classes}"):
            rows += _measure(batch, classes, device, arguments.rounds)
    columns = ("batch x classes", "loss", "ms", "CPU ms", "ratio of ms", "ratio of CPU ms", "at most")
    text = (
        f"Forward and backward without labels, {arguments.rounds} interleaved rounds on {device}, torch threads: "
        f"{arguments.threads}. Median and range. Ratios are to `kd` by plain autograd, of the soft rank to a sort."
    )
    write_section("losses" if device.type == "cpu" else "losses-gpu", f"{text}\n\n{table(columns, rows)}")


def _measure(batch: int, classes: int, device: torch.device, num_rounds: int) -> list[list[str]]:
    workloads = workloads_of(batch, classes, device)
    wall = {name: Series() for name in workloads}
    cpu = {name: Series() for name in workloads}
    repeats = max(1, 2_000_000 // (batch * classes))
    for _ in range(num_rounds):
        for name, function in workloads.items():
            function()  # caches, and the allocator, see this loss as training would
            wait_for(device)
            began, cpu_began = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                function()
            wait_for(device)
            wall[name].add(1e3 * (time.perf_counter() - began) / repeats)
            cpu[name].add(1e3 * (time.process_time() - cpu_began) / repeats)
    rows = []
    for name in workloads:
        if name in ("kd", "torch.sort"):
            rows.append([f"{batch} x {classes}", name, wall[name].show(2), cpu[name].show(2), "1", "1", ""])
            continue
        base = "torch.sort" if name == "soft rank" else "kd"
        limit = SOFT_RANK_LIMIT if name == "soft rank" else LOSSES[name][1]
        of_wall, of_cpu = ratio(wall[name], wall[base]), ratio(cpu[name], cpu[base])
        target = "" if limit is None else f"{limit:g} {base}: {verdict(of_wall.median <= limit)}"
        rows.append(
            [
                f"{batch} x {classes}",
                name,
                wall[name].show(2),
                cpu[name].show(2),
                of_wall.show(2),
                of_cpu.show(2),
                target,
            ]
        )
    return rows


def workloads_of(batch: int, classes: int, device: torch.device) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    student, teacher, weights = (2 * torch.randn(batch, classes, generator=generator).to(device) for _ in range(3))
    labels = torch.randint(classes, (batch,), generator=generator).to(device)

    def train(objective: Objective) -> None:
        logits = student.detach().requires_grad_()
        objective(Signals(logits, labels, teacher))[0].backward()

    def rank() -> None:
        logits = (student / 2).detach().requires_grad_()
        ranks, _ = soft_rank(logits, strength=1 / classes)
        ranks.backward(weights)

    def sort() -> tuple[Tensor, Tensor]:
        return torch.sort(student, dim=1)

    objectives = {name: Objective(params) for name, (params, _) in LOSSES.items()}
    workloads: dict[str, Callable[[], object]] = {
        name: functools.partial(train, objective) for name, objective in objectives.items()
    }
    return {**workloads, "torch.sort": sort, "soft rank": rank}


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
