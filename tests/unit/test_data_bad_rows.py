"""Rows that cannot be used: named in an error, or skipped in a way that every process repeats."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.cli.main import main
from pipeline.contracts.columns import BLOCK, ENCODED, INPUT, LABEL, PARTNER_LABEL, SAMPLE_ID, VIEW
from pipeline.contracts.events import Event, Journal, read_events
from pipeline.data import AugmentParams, BlockPlan, Decoder, decode_block, iterate_rows, read_blocks
from pipeline.data.bad_rows import NO_SAMPLE, find_substitutes, report_bad_rows
from pipeline.data.pixels.decode import BAD
from pipeline.data.sources.parquet import ParquetParams, ParquetSource
from pipeline.errors import DataError
from pipeline.evaluation import EvaluationParams
from pipeline.execution.skipped import SkippedRows
from pipeline.training import EvaluationSet
from pipeline.training.context import Worker
from tests.recorder import Recorder

RGB = np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(20) % 3
AUGMENT = AugmentParams(crop_padding=1, flip=True)
MIXED = AugmentParams(flip=True, mixup=1.0)


def encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def nested(rows: list[Any]) -> pa.Array:
    return pa.array(rows, pa.list_(pa.list_(pa.list_(pa.uint8()))))


def write(path: Path, images: pa.Array, labels: Any = LABELS) -> None:
    pq.write_table(pa.table({"image": images, "label": labels}), path, row_group_size=7)


def open_parquet(path: Path, **params: Any) -> ParquetSource:
    values = {"on_bad_row": "skip", "validation_fraction": 0.2, "test_fraction": 0.2} | params
    return ParquetParams(path=str(path), **values).open()


PNGS = [encode(image) for image in RGB]
LISTS: list[Any] = RGB.tolist()
FEATURES: list[Any] = RGB[:, 0, 0].astype(float).tolist()
CASES: dict[str, tuple[pa.Array, Any, str]] = {
    "no image": (pa.array([*PNGS[:4], b"junk", *PNGS[5:]]), LABELS, "is not an image that can be read"),
    "damaged": (pa.array([*PNGS[:4], PNGS[4][:90], *PNGS[5:]]), LABELS, "is a damaged image"),
    "other size": (pa.array([*PNGS[:4], encode(RGB[4, :3]), *PNGS[5:]]), LABELS, "height 3 and width 5, expected 6"),
    "null image": (pa.array([*PNGS[:4], None, *PNGS[5:]]), LABELS, "holds a null"),
    "null list": (nested([*LISTS[:4], None, *LISTS[5:]]), LABELS, "holds a null"),
    "null inside": (nested([*LISTS[:4], [*LISTS[4][:5], None], *LISTS[5:]]), LABELS, "holds a null"),
    "null pixel": (nested([*LISTS[:4], [*LISTS[4][:5], [[1, 2, None]] * 5], *LISTS[5:]]), LABELS, "holds a null"),
    "ragged": (nested([*LISTS[:4], RGB[4, :, :4].tolist(), *LISTS[5:]]), LABELS, "a list of another length"),
    "ragged inside": (nested([*LISTS[:4], [*LISTS[4][:5], LISTS[4][5][:2]], *LISTS[5:]]), LABELS, "another length"),
    "not finite": (pa.array([*FEATURES[:4], [1.0, np.nan, 2.0], *FEATURES[5:]]), LABELS, "NaN or infinite"),
    "short features": (pa.array([*FEATURES[:4], [1.0], *FEATURES[5:]]), LABELS, "a list of another length"),
    "high label": (pa.array(PNGS), np.where(np.arange(20) == 4, 9, LABELS), "has label 9, expected 0 to 2"),
    "low label": (pa.array(PNGS), np.where(np.arange(20) == 4, -1, LABELS), "a label below 0"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_bad_row_is_replaced_by_the_next(tmp_path: Path, case: str) -> None:
    images, labels, sentence = CASES[case]
    write(tmp_path / "train.parquet", images, labels)
    write(tmp_path / "validation.parquet", images.take(pa.array([0, 1])), LABELS[:2])
    write(tmp_path / "test.parquet", images.take(pa.array([0, 1])), LABELS[:2])
    source = open_parquet(tmp_path, num_classes=3)
    assert 4 in source.split("train").sample_ids
    told: dict[int, str] = {}
    for reader in (source.split("train"), source.load("train")):
        table = read_blocks(reader, [BlockPlan(2, 0, 0, np.array([7, 4, 2, 9]))])
        block = decode_block(table, source.decoder("train"), AugmentParams(), 0, told.update)
        assert block[SAMPLE_ID].tolist() == [7, 2, 2, 9]
        np.testing.assert_array_equal(block[LABEL], LABELS[[7, 2, 2, 9]])
        np.testing.assert_array_equal(block[INPUT][1], block[INPUT][2])
        assert set(block[BLOCK].tolist()) == {2}
        assert list(told) == [4]
        assert f"{tmp_path}/train.parquet: row 4 (sample 4) " in told[4]
        assert sentence in told[4]

    strict = Decoder(source.spec.kind, source.spec.shape, source.decoder("train").files, num_classes=3)
    with pytest.raises(DataError, match=r"train.parquet: row 4 \(sample 4\) ") as caught:
        strict.decode(source.split("train").read(np.array([3, 4])))
    assert sentence in caught.value.message


def test_first_rows_may_be_bad(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", pa.array([None, b"junk", *PNGS[2:]]))
    assert open_parquet(tmp_path).spec.shape == (3, 6, 5)
    with pytest.raises(DataError, match="column 'image' is null in its first row"):
        open_parquet(tmp_path, on_bad_row="error")


def test_a_group_of_nothing_but_bad_rows(tmp_path: Path) -> None:
    for images in (pa.array([*PNGS[:7], *[None] * 7, *PNGS[14:]]), nested([*LISTS[:7], *[[]] * 7, *LISTS[14:]])):
        write(tmp_path / "train.parquet", images)
        source = open_parquet(tmp_path)
        table = source.load("train").table
        np.testing.assert_array_equal(table[BAD].to_numpy(), table[SAMPLE_ID].to_numpy() // 7 == 1)


def test_substitutes_are_the_next_good_rows() -> None:
    assert find_substitutes(6, [1, 2, 5]).tolist() == [0, 3, 3, 3, 4, 0]
    assert find_substitutes(3, []).tolist() == [0, 1, 2]
    assert find_substitutes(3, [0, 1]).tolist() == [2, 2, 2]


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Twenty rows of train, of which three are bad in different ways; six of validation, the third of them bad."""
    images: list[Any] = list(PNGS)
    images[3], images[8], images[15] = b"junk", None, PNGS[15][:80]
    write(tmp_path / "train.parquet", pa.array(images))
    held_out = [PNGS[0], PNGS[1], b"junk", *PNGS[3:6]]
    for name in ("validation", "test"):
        write(tmp_path / f"{name}.parquet", pa.array(held_out), LABELS[:6])
    return tmp_path


def test_a_substitute_is_the_good_row_as_it_would_be_anyway(damaged: Path) -> None:
    source = open_parquet(damaged)
    reader, decoder = source.split("train"), source.decoder("train")
    ids = np.array([3, 8, 12, 0, 15])
    block = decode_block(read_blocks(reader, [BlockPlan(0, 1, 1, ids)]), decoder, AUGMENT, 5)
    good = decode_block(read_blocks(reader, [BlockPlan(0, 1, 1, np.array([12, 12, 12, 0, 12]))]), decoder, AUGMENT, 5)
    assert block[SAMPLE_ID].tolist() == [12, 12, 12, 0, 12]
    for name in good:
        np.testing.assert_array_equal(block[name], good[name])


def test_bad_rows_in_mixed_blocks(damaged: Path) -> None:
    source = open_parquet(damaged)
    reader, decoder = source.split("train"), source.decoder("train")
    told: dict[int, str] = {}
    table = read_blocks(reader, [BlockPlan(0, 0, 0, np.arange(20))], MIXED, 1)
    partners = table["partner_id"].to_numpy()
    block = decode_block(table, decoder, MIXED, 1, told.update)
    assert sorted(told) == [3, 8, 15]
    plain = decode_block(read_blocks(reader, [BlockPlan(0, 0, 0, np.arange(20))]), decoder, AugmentParams(flip=True), 1)
    np.testing.assert_array_equal(block[SAMPLE_ID], plain[SAMPLE_ID])
    met = 0
    for row, sample_id in enumerate(block[SAMPLE_ID].tolist()):
        if partners[sample_id] in (3, 8, 15):
            met += 1
            np.testing.assert_array_equal(block[INPUT][row], plain[INPUT][row])
            assert block[PARTNER_LABEL][row] == block[LABEL][row]
        else:
            assert block[PARTNER_LABEL][row] == LABELS[partners[sample_id]]
    assert met


def test_a_block_without_a_good_row_is_an_error(damaged: Path) -> None:
    source = open_parquet(damaged)
    table = read_blocks(source.split("train"), [BlockPlan(9, 0, 0, np.array([8, 3]))])
    with pytest.raises(DataError, match=r"all 2 rows of block 9 are bad, .* the first: .*row 8 \(sample 8\) holds a"):
        decode_block(table, source.decoder("train"), AUGMENT, 0)
    kept = decode_block(table, source.decoder("train"), AugmentParams(), 0, substitute=False)
    assert kept[SAMPLE_ID].tolist() == [NO_SAMPLE, NO_SAMPLE]
    assert not kept[INPUT].any()


def test_error_is_the_default(damaged: Path) -> None:
    source = open_parquet(damaged, on_bad_row="error")
    with pytest.raises(DataError, match=r"train.parquet: row 8 \(sample 8\) holds a null"):
        source.load("train")
    source.decoder("train").decode(source.split("train").read(np.array([0, 1])))
    with pytest.raises(DataError, match=r"train.parquet: row 3 \(sample 3\) is not an image"):
        source.decoder("train").decode(source.split("train").read(np.array([0, 3])))


def test_tables_with_and_without_the_column_go_together() -> None:
    """Where a reader marks bad rows only in tables that have some."""
    files = Decoder("features", (2,), skip_bad=True)
    encoded = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(4, np.float32)), 2)
    plain = pa.table({SAMPLE_ID: [0, 1], ENCODED: encoded, LABEL: [0, 1]})
    marked = pa.table({SAMPLE_ID: [2, 3], ENCODED: encoded, LABEL: [0, 1], BAD: [False, True]})
    table = pa.concat_tables([plain, marked], promote_options="default")
    assert list(files.decode_rows(table)[1]) == [3]
    block = table.append_column(VIEW, pa.array([0] * 4)).append_column(BLOCK, pa.array([0] * 4))
    assert decode_block(block, files, AugmentParams(), 0)[SAMPLE_ID].tolist() == [0, 1, 2, 0]


# --- evaluation -------------------------------------------------------------------------------------------------


class Flat(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.float().flatten(1)[:, :3]


@pytest.mark.parametrize("batch_size", [2, 6])
def test_metrics_leave_bad_rows_out(damaged: Path, batch_size: int) -> None:
    source = open_parquet(damaged)
    teacher_logits = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
    params = EvaluationParams(batch_size=batch_size)
    recorder = Recorder()
    rows = EvaluationSet(
        source.spec,
        source.decoder("validation"),
        source.split("validation"),
        "validation",
        params,
        teacher_logits,
        recorder,
    )
    result = rows.evaluate(Flat(), Worker(torch.device("cpu"))).metrics
    good = [0, 1, 3, 4, 5]
    logits = RGB[good].transpose(0, 3, 1, 2).reshape(5, -1)[:, :3].astype(float)
    assert result["val/num_rows"] == 5
    assert result["val/top1"] == pytest.approx((logits.argmax(1) == LABELS[good]).mean())
    assert result["val/agreement"] == pytest.approx((logits.argmax(1) == teacher_logits[good].argmax(1)).mean())
    (event,) = recorder.events
    assert list(event.data["bad_rows"]) == ["2"]
    assert event.data["split"] == "validation"
    assert rows.evaluate(Flat(), Worker(torch.device("cpu"))).metrics == result


def test_ranks_mark_their_bad_rows(damaged: Path) -> None:
    source = open_parquet(damaged)
    marked = [
        np.concatenate([rows[BAD] for rows in iterate_rows(source.decoder("test"), source.split("test"), rank, 2, 2)])
        for rank in range(2)
    ]
    assert [part.tolist() for part in marked] == [[False, True, False], [False] * 3]


# --- telling ----------------------------------------------------------------------------------------------------


def test_rows_are_told_once_and_listed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "events.jsonl")
    skipped = SkippedRows(tmp_path, journal)
    assert skipped.summary() == ""
    for _ in range(2):
        for sample_id in range(9):
            report_bad_rows(skipped, "train", {sample_id: f"a.parquet: row {sample_id} is bad; mend it."})
        report_bad_rows(skipped, "test", {0: "b.parquet: row 0 is bad."})
    assert len(skipped) == 10
    messages = [event.data["message"] for event, _ in read_events(journal.path) if event.kind == "warning"]
    assert messages == [
        "skipped a row of train: a.parquet: row 0 is bad; mend it.",
        "skipped a row of train: a.parquet: row 1 is bad; mend it.",
        "skipped a row of train: a.parquet: row 2 is bad; mend it.",
        f"4 bad rows were skipped so far, listed in {skipped.path}",
        f"8 bad rows were skipped so far, listed in {skipped.path}",
    ]
    assert skipped.summary() == (
        f"10 bad rows were skipped, listed in {skipped.path}: a.parquet: row 0 is bad; a.parquet: row 1 is bad; "
        "a.parquet: row 2 is bad; ..."
    )
    skipped.emit(Event("warning", {"message": "of another kind"}))
    assert [event.data["message"] for event, _ in read_events(journal.path)][-1] == "of another kind"

    # A later start goes on counting, also after a line that was cut off.
    with skipped.path.open("a") as file:
        file.write('{"split": "train", "samp')
    again = SkippedRows(tmp_path, journal)
    report_bad_rows(again, "train", {8: "known", 11: "a.parquet: row 11 is bad."})
    assert len(again) == len(SkippedRows(tmp_path, None)) == 11
    assert len(list(read_events(journal.path))) == 6


def test_nothing_is_emitted_for_nothing(tmp_path: Path) -> None:
    skipped = SkippedRows(tmp_path, None)
    report_bad_rows(skipped, "train", {})
    report_bad_rows(None, "train", {1: "bad"})
    assert list(tmp_path.iterdir()) == []


# --- a run ------------------------------------------------------------------------------------------------------


def test_a_run_skips_and_tells(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "data=parquet",
        f"data.path={damaged}",
        "student=mlp",
        "loss=cross_entropy",
        "cluster=inprocess",
        "train.batch_size=10",
        "train.epochs=2",
        "data.augment.mixup=0.5",
        f"run.dir={damaged}/run",
        f"tracking.uri=sqlite:///{damaged}/mlflow.db",
    )
    assert main(["distill", *arguments]) == 2  # a null is found when the rows are loaded
    error = capsys.readouterr().err
    assert "train.parquet: row 8 (sample 8) holds a null; fill it in or remove the row; or set data.on_bad" in error
    assert main(["distill", *arguments, "data.on_bad_row=skip"]) == 0
    out = capsys.readouterr().out
    folder = damaged / "run"
    result = json.loads((folder / "result.json").read_text())
    assert result["num_bad_rows"] == 5  # three of train, one of validation and of test each
    assert result["metrics"]["val/num_rows"] == result["metrics"]["test/num_rows"] == 5
    assert f"5 bad rows were skipped, listed in {folder}/bad_rows.jsonl: " in out
    lines = [json.loads(line) for line in (folder / "bad_rows.jsonl").read_text().splitlines()]
    assert {(line["split"], line["sample_id"]) for line in lines} == {
        ("train", 3), ("train", 8), ("train", 15), ("validation", 2), ("test", 2)
    }  # fmt: skip
    kept = json.loads((folder / "evaluation.json").read_text())
    assert kept.keys() == {"validation", "test"}
    assert kept["test"]["per_class"].keys() == {"0", "1", "2"}
    assert kept["validation"]["step"] == result["best_step"]
    assert kept["validation"]["metrics"]["val/top1"] == result["metrics"]["val/top1"]

    assert main(["evaluate", f"run={folder}"]) == 0
    assert "2 bad rows were skipped" in capsys.readouterr().out
    assert json.loads((folder / "evaluate" / "result.json").read_text())["num_bad_rows"] == 2
    evaluated = json.loads((folder / "evaluate" / "evaluation.json").read_text())
    assert evaluated["test"]["per_class"] == kept["test"]["per_class"]
