"""The file of predictions: its columns, how it grows, that it is whole or not there; and the rows as they are shown."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline.data import predictions
from pipeline.data.pixels.decode import SourceFile
from pipeline.data.predictions import PredictionWriter, softmax
from pipeline.errors import PipelineError
from pipeline.report import display, rows
from pipeline.report.rows import RowProgress

CLASSES = ("cat", "dog", "fox")
FILES = (SourceFile("a.parquet", 0), SourceFile("b.parquet", 2), SourceFile("c.parquet", 2), SourceFile("d.parquet", 5))
LOGITS = np.log(np.array([[1, 2, 5], [6, 1, 1], [1, 3, 4], [2, 7, 1]], np.float32))


def write(path: Path, files: tuple[SourceFile, ...] = (), missing: tuple[int, ...] = ()) -> PredictionWriter:
    """Four rows, ids 1, 2, 4 and 5, in two parts."""
    sample_ids, is_missing = np.array([1, 2, 4, 5]), np.isin(np.arange(4), missing)
    with PredictionWriter(path, CLASSES, files, {"run": "a run"}) as writer:
        for part in (slice(0, 3), slice(3, 4)):
            writer.write(sample_ids[part], LOGITS[part], is_missing[part])
    return writer


def test_columns_of_predictions(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    writer = write(path, FILES)
    table = pq.read_table(path)
    assert {field.name: field.type for field in table.schema} == {
        "sample_id": pa.int64(),
        "file": pa.string(),
        "row": pa.int64(),
        "label": pa.int32(),
        "class_name": pa.dictionary(pa.int32(), pa.string()),
        "probability": pa.float32(),
        "probabilities": pa.list_(pa.float32(), 3),
    }
    assert table["sample_id"].to_pylist() == [1, 2, 4, 5]
    assert table["file"].to_pylist() == ["a.parquet", "c.parquet", "c.parquet", "d.parquet"]  # b has no rows
    assert table["row"].to_pylist() == [1, 0, 2, 0]
    assert table["label"].to_pylist() == [2, 0, 2, 1]
    assert table["class_name"].to_pylist() == ["fox", "cat", "fox", "dog"]
    assert table["probability"].to_pylist() == pytest.approx([0.625, 0.75, 0.5, 0.7])
    assert table["probabilities"][0].as_py() == pytest.approx([0.125, 0.25, 0.625])
    metadata = table.schema.metadata
    assert json.loads(metadata[b"class_names"]) == list(CLASSES)
    assert metadata[b"run"] == b"a run"
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"
    assert (writer.num_rows, writer.class_counts.tolist()) == (4, [1, 1, 2])


def test_rows_without_a_file_have_none(tmp_path: Path) -> None:
    write(tmp_path / "out.parquet")
    assert pq.read_schema(tmp_path / "out.parquet").names == [
        "sample_id", "label", "class_name", "probability", "probabilities",
    ]  # fmt: skip


def test_a_missing_prediction_is_null_and_not_counted(tmp_path: Path) -> None:
    writer = write(tmp_path / "out.parquet", missing=(0, 3))
    table = pq.read_table(tmp_path / "out.parquet")
    for name in ("label", "class_name", "probability"):
        assert table[name].is_null().to_pylist() == [True, False, False, True]
    assert table["probabilities"][0].as_py() == [None, None, None]
    assert table["probabilities"][1].as_py() == pytest.approx([0.75, 0.125, 0.125])
    assert table["class_name"].to_pylist()[1:3] == ["cat", "fox"]
    assert (writer.num_rows, writer.class_counts.tolist()) == (4, [1, 0, 1])


def test_rows_are_on_disk_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "ROW_GROUP_BYTES", 4_000)
    path = tmp_path / "out.parquet"
    logits = np.random.default_rng(0).normal(size=(100, len(CLASSES))).astype(np.float32)
    with PredictionWriter(path, CLASSES, (), {}) as writer:
        for first in range(0, 1_000, 100):
            writer.write(np.arange(first, first + 100), logits, np.zeros(100, bool))
        (temporary,) = tmp_path.iterdir()
        assert temporary.name.startswith(".out.parquet.")
        assert temporary.stat().st_size > 4_000
    assert list(tmp_path.iterdir()) == [path]
    file = pq.ParquetFile(path)
    assert file.num_row_groups == 5  # 3.2 kB a part: every second one fills a group
    assert file.read()["sample_id"].to_pylist() == list(range(1_000))


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    writer = PredictionWriter(tmp_path / "out.parquet", CLASSES, (), {})

    def fail() -> None:
        with writer:
            writer.write(np.arange(4), LOGITS, np.zeros(4, bool))
            raise PipelineError("the stream ended")

    with pytest.raises(PipelineError, match="the stream ended"):
        fail()
    assert list(tmp_path.iterdir()) == []
    writer.discard()  # again, as a signal would


def test_softmax_of_large_logits() -> None:
    found = softmax(np.array([[1_000, 1_000 + math.log(3)], [-90_000, 0]], np.float32))
    np.testing.assert_allclose(found, [[0.25, 0.75], [0, 1]], rtol=1e-4)
    assert found.dtype == np.float32


# --- progress -----------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def localtime(self, at: float | None) -> None:
        assert at is None  # now

    def strftime(self, _format: str, _at: None) -> str:
        return "12:00:00"


def advance(console: Console, monkeypatch: pytest.MonkeyPatch) -> RowProgress:
    """1,000 rows: 100 after 30 s of starting up, then 100 every 4 s."""
    clock = Clock()
    for module in (rows, display):
        monkeypatch.setattr(module, "time", clock)
    with RowProgress(1_000, console) as progress:
        assert progress.rows_per_s is None
        clock.now += 30
        for _ in range(10):
            progress.advance(100)
            clock.now += 4
    return progress


def test_progress_in_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    progress = advance(Console(file=output, width=100), monkeypatch)
    assert output.getvalue().splitlines() == [
        "12:00:00 100 of 1,000 rows",
        "12:00:00 400 of 1,000 rows, 25 rows/s, 24 s left",
        "12:00:00 700 of 1,000 rows, 25 rows/s, 12 s left",
        "12:00:00 1,000 of 1,000 rows, 25 rows/s, 0 s left",
    ]
    assert progress.rows_per_s == 25


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    advance(Console(file=output, width=100, force_terminal=True, color_system=None), monkeypatch)
    assert "1,000 of 1,000 rows, 25 rows/s, 0 s left" in output.getvalue()
