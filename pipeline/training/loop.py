"""The training loop: one program for Ray Train workers, the driver and a single process."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from pipeline.contracts.events import Event
from pipeline.contracts.read_ahead import ReadAhead
from pipeline.errors import NonFiniteError, StreamError
from pipeline.evaluation import METRIC_DIRECTIONS
from pipeline.losses import Objective, Signals
from pipeline.models import Classifier
from pipeline.training.context import BatchSource, WorkerContext, check_block, check_labels
from pipeline.training.optim import build_optimizer, learning_rate, set_learning_rate
from pipeline.training.params import TrainParams
from pipeline.training.plan import RunPlan
from pipeline.training.prefetch import DeviceBlock, prefetch
from pipeline.training.state import BestRecord, TrainState, build_ema
from pipeline.training.validation import EvaluationSet

_USE_EVERY_S = 10.0


@dataclass(frozen=True)
class TrainJob:
    """What to train, on what, how; the same on every worker."""

    classifier: Classifier
    objective: Objective
    params: TrainParams
    plan: RunPlan
    validation: EvaluationSet
    seed: int


def train(job: TrainJob, context: WorkerContext, source: BatchSource) -> TrainState:
    """Trains from the last checkpoint to the end of the plan.

    Returns:
        the final state; ``state.best`` is what the run keeps.

    Raises:
        NonFiniteError: a loss or gradient is NaN or infinite; raised before the optimizer step.
        StreamError: the source delivered another block than the one that was due.
        DataError: a row has no label, or one that is no class, and the loss needs labels.
    """
    return _Loop(job, context).run(source)


class _Loop:
    """Local state of one call of ``train``."""

    def __init__(self, job: TrainJob, context: WorkerContext) -> None:
        self.job, self.context, self.params, self.plan = job, context, job.params, job.plan
        self.blocks_per_worker = job.plan.blocks_per_step // context.world_size
        classifier = job.classifier.to(context.device)
        if job.params.channels_last:
            classifier = classifier.to(memory_format=torch.channels_last)
        self.state = TrainState(
            classifier,
            build_optimizer(classifier, job.params.optimizer),
            build_ema(classifier, job.params.ema_decay),
            job.plan.blocks_per_step,
        )
        if (folder := context.resume_folder()) is not None:
            self.state.load(folder)
        network: nn.Module = classifier
        if job.params.sync_batchnorm and context.world_size > 1:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.network = context.wrap(network)
        if job.params.compile:
            # All blocks of a run have one shape. Without this word on it, a run of other blocks before this one in the
            # process would have it compiled for blocks of any shape.
            self.network = torch.compile(self.network, dynamic=False)  # type: ignore[assignment]
        self.log = _StepLog(context)

    def run(self, source: BatchSource) -> TrainState:
        plan, state = self.plan, self.state
        self.context.emit(
            Event(
                "plan",
                {
                    "num_epochs": plan.num_epochs,
                    "num_steps": plan.num_steps,
                    "steps_per_epoch": plan.steps_per_epoch,
                    "rows_per_step": plan.rows_per_step,
                    "world_size": self.context.world_size,
                    "start_step": state.step,
                },
            )
        )
        if state.step >= plan.num_steps:
            return state
        blocks = prefetch(source.blocks(state.step * plan.blocks_per_step), self.context.device)
        try:
            self.network.train()
            while state.step < plan.num_steps:
                self._step(blocks)
                self._after_step(blocks)
        finally:
            blocks.close()
        return state

    def _step(self, blocks: ReadAhead[DeviceBlock]) -> None:
        step = self.state.step
        rate = learning_rate(self.params.optimizer, self.plan, step)
        set_learning_rate(self.state.optimizer, rate)
        # Dropout differs by step and rank but not by what ran before, so a resumed run repeats it.
        torch.manual_seed(((self.job.seed * 1_000_003 + step) * 4_099 + self.context.rank) % 2**63)
        totals: dict[str, Tensor] = {}
        for micro_step in range(self.blocks_per_worker):
            block = self._next_block(blocks, micro_step)
            loss, terms = self._backward(block, last=micro_step == self.blocks_per_worker - 1)
            for name, value in {"loss": loss, **terms}.items():
                totals[name] = totals.get(name, torch.zeros((), device=loss.device)) + value / self.blocks_per_worker
        grad_norm = nn.utils.clip_grad_norm_(
            self.state.classifier.parameters(), self.params.optimizer.clip_grad_norm or math.inf
        )
        totals["grad_norm"] = grad_norm
        # The one wait for the device in a step; without it a NaN would reach the weights.
        values = dict(zip(totals, torch.stack(list(totals.values())).tolist(), strict=True))
        self._refuse_non_finite(values, rate)
        self.state.optimizer.step()
        self.state.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        if self.state.ema is not None:
            self.state.ema.update_parameters(self.state.classifier)
        self.log.add(values, rate)

    def _next_block(self, blocks: Iterator[DeviceBlock], micro_step: int) -> DeviceBlock:
        first = self.state.step * self.plan.blocks_per_step
        expected = first + micro_step * self.context.world_size + self.context.rank
        block = next(blocks, None)
        if block is None:
            raise StreamError(f"the stream ended before block {expected} of {self.plan.num_blocks}; resume the run")
        check_block(block.source, expected, self.plan.batch_size)
        check_labels(block.source, self.job.objective.label_terms, self.job.classifier.spec.num_classes)
        return block

    def _backward(self, block: DeviceBlock, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        autocast = torch.autocast(
            self.context.device.type, dtype=torch.bfloat16, enabled=self.params.precision == "bf16"
        )
        inputs = block.inputs
        if self.params.channels_last and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        # Gradients are averaged over the workers once a step, with the last of its micro-steps.
        synchronised = last or not hasattr(self.network, "no_sync")
        with contextlib.nullcontext() if synchronised else self.network.no_sync():  # type: ignore[operator]
            with autocast:
                logits = self.network(inputs)
            signals = Signals(logits, block.labels, block.teacher_logits, block.partner_labels, block.label_weights)
            loss, terms = self.job.objective(signals, self.state.step / self.plan.num_steps)
            (loss / self.blocks_per_worker).backward()
        return loss.detach(), terms

    def _refuse_non_finite(self, values: dict[str, float], rate: float) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            step = self.state.step + 1
            raise NonFiniteError(
                f"{', '.join(bad)} became {', '.join(str(values[name]) for name in bad)} at step {step} (epoch "
                f"{self.plan.epoch_of_step(step - 1) + 1}, learning rate {rate:.3g}); the weights were not updated. "
                "Lower train.optimizer.lr, set train.optimizer.clip_grad_norm=1, or use train.precision=fp32.",
                step=step,
            )

    def _after_step(self, blocks: ReadAhead[DeviceBlock]) -> None:
        step, plan, params = self.state.step, self.plan, self.params
        finished = step == plan.num_steps
        epoch = plan.epoch_of_step(step)
        evaluating = finished or (plan.ends_epoch(step) and epoch % params.evaluate_every == 0)
        saving = evaluating or (params.checkpoint_every is not None and step % params.checkpoint_every == 0)
        if step % params.log_every == 0 or evaluating:
            self.log.flush(step, epoch, plan, blocks.waited_s)
        if saving:
            average_buffers(self.state.classifier, self.context)
            if self.state.ema is not None:
                average_buffers(self.state.ema, self.context)
            if evaluating:
                self._evaluate(epoch)
            self._save()
            self.log.restart(blocks.waited_s)

    def _evaluate(self, epoch: int) -> None:
        state = self.state
        result = self.job.validation.evaluate(state.evaluated(), self.context, autocast=self.params.precision == "bf16")
        value = result.metrics[self.params.select_by]
        sign = 1.0 if METRIC_DIRECTIONS[self.params.select_by.split("/")[-1]] == "max" else -1.0
        best = state.best
        # A first value that is not finite stands only until there is one to compare.
        bar = -math.inf if best is None or not math.isfinite(best.value) else sign * best.value
        improved = math.isfinite(value) and sign * value > bar
        if improved or best is None:
            state.best = BestRecord(value, state.step, epoch, result.metrics, state.evaluated_weights())
        state.last_metrics = result.metrics
        data = {
            "split": "validation",
            "step": state.step,
            "epoch": epoch,
            "metrics": result.metrics,
            "per_class": result.per_class,
            "best": improved,
        }
        state.note_evaluation(data)
        self.context.emit(Event("evaluation", data))

    def _save(self) -> None:
        metrics = {**self.state.last_metrics, "step": float(self.state.step)}
        if self.context.rank != 0:
            self.context.commit(None, metrics)
            return
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as name:
            self.state.save(Path(name))
            self.context.commit(Path(name), metrics)
        best = self.state.best is not None and self.state.best.step == self.state.step
        self.context.emit(Event("checkpoint", {"step": self.state.step, "best": best}))


class _StepLog:
    """Averages training metrics between two records, over steps and workers."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._process = psutil.Process()
        self._last_use = 0.0
        self._sums: dict[str, float] = {}
        self._count = 0
        self._rate = 0.0
        self.restart(0.0)

    def restart(self, waited_s: float) -> None:
        """Leaves what happened since the last record (an evaluation) out of the speed."""
        self._since, self._waited_s, self._timed_steps = time.perf_counter(), waited_s, 0

    def add(self, values: dict[str, float], rate: float) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        self._timed_steps += 1
        self._rate = rate

    def flush(self, step: int, epoch: int, plan: RunPlan, waited_s: float) -> None:
        names = sorted(self._sums)
        sums = torch.tensor([self._sums[name] for name in names], dtype=torch.float64, device=self._context.device)
        means = (self._context.sum_over_workers(sums) / (self._context.world_size * self._count)).tolist()
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        metrics = {f"train/{name}": value for name, value in zip(names, means, strict=True)}
        metrics["train/lr"] = self._rate
        self._context.emit(
            Event(
                "step",
                {
                    "step": step,
                    "epoch": epoch,
                    "samples": step * plan.rows_per_step,
                    "metrics": metrics,
                    "samples_per_s": self._timed_steps * plan.rows_per_step / elapsed,
                    "data_wait": min(max(waited_s - self._waited_s, 0.0) / elapsed, 1.0),
                },
            )
        )
        self._sums, self._count = {}, 0
        self._note_use()
        self.restart(waited_s)

    def _note_use(self) -> None:
        now = time.perf_counter()
        if now - self._last_use < _USE_EVERY_S:
            return
        self._last_use = now
        cpu = self._process.cpu_times()
        use = {"rss_bytes": self._process.memory_info().rss, "cpu_s": cpu.user + cpu.system}
        if self._context.device.type == "cuda":
            use["gpu_bytes"] = torch.cuda.max_memory_allocated(self._context.device)
        self._context.emit(Event("system", {"process": f"worker{self._context.rank}", **use}))


def average_buffers(network: nn.Module, context: WorkerContext) -> None:
    """BatchNorm's running statistics become their mean over the workers."""
    if context.world_size == 1:
        return
    buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    if not buffers:
        return
    flat = torch.cat([buffer.detach().reshape(-1).double() for buffer in buffers])
    flat = context.sum_over_workers(flat) / context.world_size
    for buffer, values in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(values.reshape(buffer.shape))
