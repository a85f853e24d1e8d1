"""``predict run=RUN out=FILE``: labels and probabilities, by the network that a run kept, for one's own rows."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.compose import parse_overrides
from pipeline.config.load import load_stored, take_run
from pipeline.config.request import Request
from pipeline.config.runs import refuse_vanishing, settle
from pipeline.config.schema import Config, teacher_classes
from pipeline.config.stored import StoredRun, find_run, read_run
from pipeline.contracts.columns import INPUT, SAMPLE_ID, InputSpec
from pipeline.data import AugmentParams, Decoder, SplitReader, iterate_rows
from pipeline.data.bad_rows import NO_SAMPLE
from pipeline.data.pixels.decode import BAD, name_row
from pipeline.data.predictions import PredictionWriter
from pipeline.data.waiting import WaitsOnConsole
from pipeline.errors import ConfigError, DataError, PipelineError, StreamError
from pipeline.execution.pool import (
    estimate_block_bytes,
    list_stream_demands,
    make_pool_plan,
    pool_device,
    stream_limits,
)
from pipeline.execution.session import end_process, run_interruptibly
from pipeline.execution.work import trained_network
from pipeline.models import ModelCard, Teacher, build_classifier, load_checkpoint, read_card, resolve_checkpoint
from pipeline.report.rows import RowProgress
from pipeline.report.tables import render_table
from pipeline.training import TeacherArguments, open_test

_TAKES = ("data", "cluster", "teacher.pool", "evaluation.batch_size")
_ACTOR = "prediction actor"
_CLASSES_SHOWN = 10
_ROWS_NAMED = 3

_Blocks = Generator[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class _Prediction:
    """What the command amounts to.

    Attributes:
        config: of the run, with what the command line puts in its place.
        network: parameters of the kept network, with its weights as checkpoint.
        spec: what it was trained on.
        reader: the rows, in order of sample id.
        where: the rows come from, for people.
    """

    run: StoredRun
    config: Config
    role: str
    network: Any
    card: ModelCard
    spec: InputSpec
    reader: SplitReader
    decoder: Decoder
    where: str
    out: Path

    @property
    def batch_size(self) -> int:
        return self.config.evaluation.batch_size

    def arguments(self, device: str | None) -> TeacherArguments:
        """What the network is built from; on the GPU of the process, if it has one, where no device is named."""
        import torch

        chosen = None if device is None else torch.device(device)
        return TeacherArguments(params=self.network, spec=self.spec, batch_size=self.batch_size, device=chosen)


def predict(request: Request) -> int:
    """Writes one row of predictions for each row of the data, in the same order; returns 0.

    The run itself is not changed. On Ray the network runs as a pool of actors of the size ``teacher.pool``.

    Raises:
        PipelineError: with ``exit_code`` 1 in its details once predicting had begun.
    """
    prediction = _prepare(request)
    out, files = prediction.out, prediction.decoder.files
    metadata = {"run": prediction.run.name, "weights_fingerprint": prediction.card.fingerprint}
    writer = PredictionWriter(out, prediction.spec.class_names, files, metadata)
    missing: list[int] = []
    progress = RowProgress(prediction.reader.num_rows)

    def stop(code: int) -> None:
        progress.close()
        writer.discard()
        print(f"stopped by {signal.Signals(code - 128).name}: {out} was not written", file=sys.stderr, flush=True)
        end_process(code)

    def work() -> None:
        with _open_logits(prediction) as blocks:
            try:
                with writer, progress:
                    missing.extend(_write(writer, progress, blocks, prediction.reader.sample_ids))
            except PipelineError as error:
                error.details["exit_code"] = 1
                raise

    run_interruptibly(work, stop)
    _show_result(prediction, writer, progress, missing)
    return 0


def _write(writer: PredictionWriter, progress: RowProgress, blocks: _Blocks, expected: np.ndarray) -> list[int]:
    """Writes the blocks as they come; returns the ids of rows that could not be decoded.

    Args:
        blocks: in order; rows that could not be decoded have the sample id NO_SAMPLE.
        expected: sample ids of all rows.

    Raises:
        StreamError: the blocks are not these rows.
    """
    missing: list[int] = []
    for sample_ids, logits in blocks:
        due = expected[writer.num_rows : writer.num_rows + len(sample_ids)]
        bad = sample_ids == NO_SAMPLE
        if not np.array_equal(sample_ids[~bad], due[~bad]):
            raise StreamError(
                f"the stream delivered other rows where rows {writer.num_rows} to {writer.num_rows + len(due) - 1} "
                "were due; run the command again"
            )
        writer.write(due, logits, bad)
        progress.advance(len(due))
        missing += due[bad].tolist()
    if writer.num_rows != len(expected):
        raise StreamError(f"the stream ended after {writer.num_rows} of {len(expected)} rows; run the command again")
    return missing


# --- before anything starts ---------------------------------------------------------------------------------------


def _prepare(request: Request) -> _Prediction:
    """Checks everything that can be checked without reading pixels."""
    run_name, others = take_run(request.overrides, "run")
    if run_name is None:
        raise ConfigError("predict needs run=RUN: a run folder, or its name under runs/")
    out_name, others = take_run(others, "out", "the name of a Parquet file")
    if out_name is None:
        raise ConfigError("predict needs out=FILE.parquet: where to write the predictions")
    out = _check_out(out_name)
    run = read_run(find_run(run_name))
    own_data = _check_overrides(others, request)
    config = settle(load_stored(run, others, request.conf_dirs))

    weights = resolve_checkpoint(str(run.dir))
    card = read_card(weights.parent)
    spec = InputSpec.from_dict(card.input)
    role, trained = trained_network(config, run.command)
    values = {**trained.model_dump(), "checkpoint": str(weights), "precision": config.train.precision}
    network: Any = teacher_classes()[trained.name].model_validate(values)  # what ``Teacher`` takes has a precision
    load_checkpoint(build_classifier(network, spec), network, role=role)

    reader, decoder, where = _open_rows(config, spec, own_data)
    _make_folder(out)
    prediction = _Prediction(run, config, role, network, card, spec, reader, decoder, where, out)
    print(f"the {role} of run {run.name} ({network.name}) predicts {reader.num_rows:,} rows: {where}", flush=True)
    return prediction


def _check_overrides(overrides: list[str], request: Request) -> bool:
    """Refuses overrides of what the run made the network of; tells whether any is of the data."""
    parsed = parse_overrides(overrides, request.conf_dirs)
    for override in parsed:
        if not any(override.key == key or override.key.startswith(f"{key}.") for key in _TAKES):
            raise ConfigError(
                f"{override.text.removeprefix('++')}: predict takes the network as the run made it; besides run= and "
                f"out= expected {', '.join(_TAKES[:-1])} or {_TAKES[-1]}, remove the rest"
            )
    return any(override.key.split(".")[0] == "data" for override in parsed)


def _open_rows(config: Config, spec: InputSpec, own_data: bool) -> tuple[SplitReader, Decoder, str]:
    """The rows to predict: those of ``data=``, otherwise the test split of the run's own data set."""
    data = config.data
    name = getattr(data, "path", None) or data.name
    if own_data:
        reader, decoder = data.open_rows(spec)
        return reader, decoder, f"{name}"
    source = data.open()
    if (source.spec.kind, source.spec.shape) != (spec.kind, spec.shape):
        raise DataError(
            f"{name}: the run's data set now has {source.spec.kind} input of shape {source.spec.shape}, expected "
            f"{spec.kind} of shape {spec.shape} as the network was trained on; put it back, or give other rows as "
            "data=..."
        )
    reader = open_test(source, "asked for by the predict command")
    return reader, source.decoder("test"), f"the test split of {name}, as no data=... is given"


def _check_out(name: str) -> Path:
    """The file to write, which must not be there yet."""
    path = Path(os.path.abspath(os.path.expanduser(name)))
    if path.suffix != ".parquet":
        raise ConfigError(f"out={name}: expected a name that ends in .parquet, which is what is written")
    refuse_vanishing("out", path)
    if path.exists():
        raise ConfigError(f"out={name}: exists already; remove it or name another file")
    return path


def _make_folder(out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={out}: its folder cannot be made ({error.strerror}); name another one") from error
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(f"out={out}: its folder cannot be written to; name another one")


# --- logits of all rows, block by block ---------------------------------------------------------------------------


@contextmanager
def _open_logits(prediction: _Prediction) -> Iterator[_Blocks]:
    """Sample ids and logits of consecutive blocks, from a pool of actors or from this process.

    Raises:
        ResourceError: the cluster cannot be joined or cannot hold the pool.
    """
    if prediction.config.cluster.name == "inprocess":
        yield _logits_here(prediction)
        return
    from pipeline.cluster.preflight import admitted, check_demand, demand_rows
    from pipeline.cluster.session import ray_session

    cluster, run = prediction.config.cluster, prediction.run
    demands = list_stream_demands(prediction.config, _ACTOR)
    print(render_table("preflight", ("who", "how many", "each", "in all"), demand_rows(demands)), flush=True)
    with ray_session(cluster.address, demands, run.dir / "predict" / "ray.log"):
        check_demand(demands)
        with (
            admitted(demands, f"predict {run.name}", cluster.wait_s, partial(print, flush=True)) as release,
            closing(_logits_of_pool(prediction, release)) as blocks,  # ends the stream before Ray is left
        ):
            yield blocks


def _logits_here(prediction: _Prediction) -> _Blocks:
    network = Teacher(**prediction.arguments(None))
    for rows in iterate_rows(prediction.decoder, prediction.reader, 0, 1, prediction.batch_size):
        yield np.where(rows[BAD], NO_SAMPLE, rows[SAMPLE_ID]), network(rows[INPUT])


def _logits_of_pool(prediction: _Prediction, release: Callable[[], None]) -> _Blocks:
    """As ``_logits_here``; calls ``release`` once the pool is placed."""
    from pipeline.cluster.journal import QueueDrain
    from pipeline.cluster.logits import iterate_pool_logits
    from pipeline.cluster.stream import SplitBlocks, StreamPlan, share, whole_split

    config, batch_size = prediction.config, prediction.batch_size
    pool = config.teacher.pool
    with closing(QueueDrain(WaitsOnConsole())) as drain:
        plan = StreamPlan(
            blocks=share(SplitBlocks(prediction.reader, batch_size)),
            batch_size=batch_size,
            block_bytes=estimate_block_bytes(prediction.spec, batch_size, prediction.reader),
            decoder=prediction.decoder,
            augment=AugmentParams(),
            seed=0,
            pool=make_pool_plan(pool, prediction.arguments(pool_device(pool)), prediction.card.fingerprint),
            emitter=drain.emitter,
            **stream_limits(config, _ACTOR),
        )
        for block in iterate_pool_logits(whole_split(plan), -(-prediction.reader.num_rows // batch_size)):
            release()
            yield block.sample_ids, block.logits


# --- at the end ---------------------------------------------------------------------------------------------------


def _show_result(prediction: _Prediction, writer: PredictionWriter, progress: RowProgress, missing: list[int]) -> None:
    """Prints what was predicted, and the path of the file as the last line."""
    names, counts = prediction.spec.class_names, writer.class_counts
    order = np.argsort(-counts, kind="stable")[:_CLASSES_SHOWN]
    num_predicted = int(counts.sum())
    rows: list[list[object]] = [
        [names[index], int(counts[index]), counts[index] / max(num_predicted, 1)] for index in order if counts[index]
    ]
    if (rest := num_predicted - int(counts[order].sum())) > 0:
        rows.append(["all others", rest, rest / num_predicted])
    rate = progress.rows_per_s
    speed = "" if rate is None else f", {rate:,.0f} rows/s"
    print(render_table(f"{writer.num_rows:,} rows{speed}", ("predicted class", "rows", "share"), rows))
    if missing:
        named = "; ".join(name_row(prediction.decoder.files, sample_id) for sample_id in missing[:_ROWS_NAMED])
        more = f"; and {len(missing) - _ROWS_NAMED:,} more" if len(missing) > _ROWS_NAMED else ""
        count = "1 row" if len(missing) == 1 else f"{len(missing):,} rows"
        print(f"no prediction for {count} that could not be decoded: {named}{more}")
    print(prediction.out, flush=True)
