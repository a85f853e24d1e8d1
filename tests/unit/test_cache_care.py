"""What ``cache build`` counts and records; ``cache verify``, ``cache info`` and ``cache prune``, in one process."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.cache import LoadedLogits, open_build
from pipeline.data.cache.key import CacheKey
from pipeline.data.sources.parquet import ParquetParams
from pipeline.tracking.quiet import import_mlflow
from tests.unit.cached_runs import (
    BATCH_SIZE,
    CACHED,
    EXACT,
    NUM_TRAINED,
    VIEWS,
    Workplace,
    read_view,
    write_pictures,
)

NUM_PARTS = 36  # twelve row groups in three views


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """With a cache of three views in float32; not to be changed."""
    place = Workplace.make(tmp_path_factory.mktemp("built"))
    assert place.run("cache build", "build", *VIEWS, EXACT) == 0
    return place


@pytest.fixture
def place(built: Workplace, tmp_path: Path) -> Workplace:
    """A copy of it, and of its cache."""
    shutil.copytree(built.folder, tmp_path / "copy")
    return Workplace(tmp_path / "copy")


def cache_of(place: Workplace) -> Path:
    return place.caches / place.result("build")["key"]


# --- what is recorded ---------------------------------------------------------------------------------------------


def test_rows_are_counted_by_the_teacher(built: Workplace) -> None:
    blocks = -(-NUM_TRAINED // BATCH_SIZE)
    computed, forwarded = 3 * NUM_TRAINED, 3 * blocks * BATCH_SIZE
    assert forwarded > computed
    result, recorded = built.result("build"), built.manifest("build").recorded
    figures = {"rows_computed": computed, "rows_forwarded": forwarded}
    for name, number in figures.items():
        assert result["metrics"][f"cache/{name}"] == recorded[f"{name}_last"] == number
    rows = built.events("build", "rows")[-1]
    assert (rows["done"], rows["total"]) == (computed, computed)
    (figures_event,) = built.events("build", "figures")
    assert figures_event["metrics"] == result["metrics"]
    assert result["metrics"]["cache/num_rows"] == computed
    parts = list(cache_of(built).rglob("*.arrow"))
    assert len(parts) == NUM_PARTS
    assert result["metrics"]["cache/num_bytes"] == sum(part.stat().st_size for part in parts)


def test_mlflow_has_the_cache_as_data_set(built: Workplace) -> None:
    result, manifest = built.result("build"), built.manifest("build")
    client = import_mlflow().MlflowClient(f"sqlite:///{built.folder / 'mlflow.db'}")
    tracked = client.get_run(result["mlflow_run_id"])
    assert tracked.info.status == "FINISHED"
    (dataset,) = tracked.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("parquet-logits", manifest.key.digest)
    assert json.loads(dataset.dataset.profile)["num_rows"] == manifest.num_rows
    assert str(cache_of(built)) in dataset.dataset.source
    assert tracked.data.metrics["cache/num_rows"] == manifest.num_rows
    assert tracked.data.metrics["cache/teacher_val_top1"] == manifest.teacher_accuracy
    assert tracked.data.tags["command"] == "cache build"
    stored = [file.path for file in client.list_artifacts(result["mlflow_run_id"], "cache")]
    assert stored == ["cache/cache.json"]
    told = json.loads((built.folder / "runs" / "build" / "cache.json").read_text())
    assert told["folder"] == str(cache_of(built)) == result["cache"]
    assert told["key"] == manifest.key.model_dump(mode="json")
    assert told["recorded"]["run"] == tracked.info.run_name


def test_a_complete_cache_is_left_as_it_is(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in cache_of(place).rglob("*.*") if path.name != ".lock"}
    assert place.run("cache build", "again", *VIEWS, EXACT) == 0
    assert place.result("again")["metrics"]["cache/rows_computed"] == 0
    assert place.result("again")["metrics"]["cache/rows_forwarded"] == 0
    assert before == {path: path.read_bytes() for path in cache_of(place).rglob("*.*") if path.name != ".lock"}
    assert "teacher logits" not in capsys.readouterr().out
    # A part that was deleted, with the manifest, is all that is computed.
    (cache_of(place) / "view-0001" / "part-000003.arrow").unlink()
    assert place.run("cache build", "third", *VIEWS, EXACT) == 0
    metrics = place.result("third")["metrics"]
    assert 0 < metrics["cache/rows_computed"] <= 20
    assert metrics["cache/rows_forwarded"] in (16, 32)
    assert {path: path.read_bytes() for path in cache_of(place).rglob("*.arrow")} == {
        path: content for path, content in before.items() if path.suffix == ".arrow"
    }


# --- verify -------------------------------------------------------------------------------------------------------


def read_table(printed: str) -> dict[str, float]:
    """The numbers of the table that ``cache verify`` ends with."""
    return {
        name: float(value.replace(",", "")) for name, value in re.findall(r"^(\S.*?) {2,}([\d.,e+-]+)$", printed, re.M)
    }


def test_verify_says_ok(built: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert built.run("cache verify", "-", *VIEWS, EXACT, "rows=all") == 0
    printed = capsys.readouterr().out
    assert f"ok: {NUM_PARTS} parts, 648 rows, " in printed
    table = read_table(printed)
    assert table["rows compared"] == 3 * NUM_TRAINED
    assert table["largest deviation of a logit"] == table["mean over rows"] == 0
    for rows, compared in (("rows=10", 10), ("rows=0", None), ("rows=5000", 648)):
        assert built.run("cache verify", "-", *VIEWS, EXACT, rows) == 0
        assert read_table(capsys.readouterr().out).get("rows compared") == compared
    assert built.run("cache verify", "-", *VIEWS, EXACT, "train.batch_size=7", "rows=all") == 0
    assert 0 <= read_table(capsys.readouterr().out)["largest deviation of a logit"] < 1e-4


def test_verify_without_a_teacher(built: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    name, none = cache_of(built).name, "teacher.checkpoint=null"
    assert built.run("cache verify", "-", none, f"name={name}") == 0
    printed = capsys.readouterr().out
    assert f"ok: {NUM_PARTS} parts" in printed
    assert "live teacher" not in printed
    assert built.run("cache verify", "-", none) == 2
    assert "cache verify needs name=NAME (files only), or the teacher" in capsys.readouterr().err
    assert built.run("cache verify", "-", none, f"name={name}", "rows=all") == 2
    assert "rows=all: rows are compared with the teacher" in capsys.readouterr().err
    assert built.run("cache verify", "-", none, "name=0123456789abcdef") == 2
    assert f"holds no complete cache '0123456789abcdef'; there are: {name}." in capsys.readouterr().err
    assert built.run("cache verify", "-", *VIEWS, EXACT, "rows=many") == 2
    assert "rows=many: expected a number of rows, or all" in capsys.readouterr().err


def test_verify_names_every_damaged_file(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    folder = cache_of(place)
    flipped, short, gone = (folder / "view-0002" / f"part-00000{number}.arrow" for number in (1, 4, 7))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 4
    flipped.write_bytes(content)
    short.write_bytes(short.read_bytes()[:-3])
    gone.unlink()
    (folder / "notes.txt").write_text("mine")
    for overrides in ([*VIEWS, EXACT], [f"name={folder.name}", "teacher.checkpoint=null"]):
        assert place.run("cache verify", "-", *overrides) == 1
        said = capsys.readouterr()
        assert said.err.startswith(f"CacheError: 4 files of {folder}:\n")
        lines = said.err.splitlines()[1:]
        for line, name in zip(lines, (flipped, short, gone, folder / "notes.txt"), strict=True):
            assert line.startswith(f"  - {name} ")
        assert "ok:" not in said.out
    # Training meets them too.
    assert place.run("distill", "refused", *VIEWS, EXACT, CACHED) == 2
    assert "part-00000" in capsys.readouterr().err
    for damaged in (flipped, short):
        damaged.unlink()
    assert place.run("cache build", "repaired", *VIEWS, EXACT) == 0
    assert place.result("repaired")["metrics"]["cache/rows_computed"] < 3 * 20
    (folder / "notes.txt").unlink()
    assert place.run("cache verify", "-", *VIEWS, EXACT, "rows=all") == 0


def rewrite(
    place: Workplace, key: CacheKey, logits: LoadedLogits, change: np.ndarray, absent: int | None = None
) -> Path:
    """Another cache of the same key, with ``change`` (views, rows, classes) added."""
    reader = ParquetParams(path=str(place.folder / "data")).open().split("train")
    path = place.folder / "changed"
    with open_build(str(path), key, reader) as build:
        for view, index in build.find_missing_parts():
            ids = build.layout.ids(index)
            rows = np.searchsorted(reader.sample_ids, ids)
            values = read_view(key, logits, view)[rows] + change[view, rows]
            build.writer.write(view, index, np.where(ids == absent, -1, ids), values.astype(np.float32))
        build.seal(None, {})
    return path


def test_verify_fails_where_the_teacher_says_otherwise(built: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    key, logits = built.logits("build")
    changed = rewrite(built, key, logits, np.zeros((3, NUM_TRAINED, 3)))
    assert built.run("cache verify", "-", *VIEWS, EXACT, "rows=all", f"cache.path={changed}") == 0
    shutil.rmtree(changed)
    change = np.zeros((3, NUM_TRAINED, 3))
    change[2, 100, 1] = 0.03
    changed = rewrite(built, key, logits, change)
    capsys.readouterr()
    try:
        assert built.run("cache verify", "-", *VIEWS, EXACT, "rows=all", f"cache.path={changed}") == 1
        said = capsys.readouterr()
        assert "ok: 36 parts" in said.out  # the files are whole
        assert read_table(said.out)["largest deviation of a logit"] == pytest.approx(0.03, rel=1e-3)
        assert read_table(said.out)["mean over rows"] == pytest.approx(0.03 / 648, rel=1e-2)
        assert "the teacher now gives logits that differ by up to 0.03, more than rounding explains" in said.err
        assert f"delete it with `cache prune name={key.digest}` and build it again" in said.err
    finally:
        shutil.rmtree(changed)


def test_verify_looks_at_the_rows_of_the_configuration(built: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    """A cache may have more rows than there are to train on now."""
    assert built.run("cache verify", "-", *VIEWS, EXACT, "rows=all", "data.validation_fraction=0.3") == 0
    assert read_table(capsys.readouterr().out)["rows compared"] == 3 * 168


def test_verify_where_rows_could_not_be_decoded(
    built: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, skip = Workplace(tmp_path), [*VIEWS, EXACT, "data.on_bad_row=skip"]
    write_pictures(tmp_path / "data", damaged=range(60))
    shutil.copy(built.folder / "teacher.pt", tmp_path)
    shutil.copy(built.folder / "mlflow.db", tmp_path)
    assert place.run("cache build", "build", *skip) == 0
    absent = len(place.manifest("build").absent)
    capsys.readouterr()
    assert place.run("cache verify", "-", *skip, "rows=all") == 0
    assert read_table(capsys.readouterr().out)["rows compared"] == 3 * (NUM_TRAINED - absent)
    assert place.run("cache info", "-", f"name={cache_of(place).name}") == 0
    assert re.search(rf"could not be decoded +{absent}\n", capsys.readouterr().out)
    write_pictures(tmp_path / "data", damaged=range(1, 60))
    assert place.run("cache verify", "-", *skip, "rows=all") == 1
    assert "the cache has no logits of sample 0 and 0 others of its block" in capsys.readouterr().err


# --- info and prune -----------------------------------------------------------------------------------------------


def test_info(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    name = cache_of(place).name
    begun = place.caches / ("0" * 16)
    (begun / "view-0000").mkdir(parents=True)
    shutil.copy(cache_of(place) / "view-0000" / "part-000001.arrow", begun / "view-0000")
    (place.caches / "thesis").mkdir()
    (place.caches / "thesis" / "chapter.tex").write_text("mine")
    damaged = place.caches / ("f" * 16)
    shutil.copytree(cache_of(place), damaged)
    (damaged / "manifest.json").write_text("{}")
    assert place.run("cache info", "-", *VIEWS, EXACT) == 0
    printed = capsys.readouterr().out
    states = dict(re.findall(r"^(\w+) +(complete|incomplete|damaged|foreign) ", printed, re.M))
    assert states == {name: "complete", "0" * 16: "incomplete", "f" * 16: "damaged", "thesis": "foreign"}
    assert re.search(rf"^{name} +complete +dense of 3, float32 +3 +648 ", printed, re.M)
    assert f"{damaged}/manifest.json has no schema_version" in printed
    assert printed.splitlines()[-1] == f"this configuration asks for {name}: complete"
    assert place.run("cache info", "-", *VIEWS, EXACT, "data.view_seed=1") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(": not there")
    assert place.run("cache info", "-", f"name={name}", "teacher.checkpoint=null") == 0
    shown = capsys.readouterr().out
    for what, value in (
        ("format", "dense of 3, float32"),
        ("rows", "648: 3 views of 216"),
        ("augmentation", "crop_padding 1, flip True"),
        ("seed of the views", "0"),
        ("precision", "fp32"),
        ("teacher.hidden", r"\[16\]"),
    ):
        assert re.search(rf"^{what} +{value}$", shown, re.M), (what, shown)
    assert place.run("cache info", "-", f"cache.path={place.folder / 'nowhere'}", "teacher.checkpoint=null") == 0
    assert "nowhere holds no caches" in capsys.readouterr().out


def test_info_of_a_plan(built: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan.rows=216", "plan.classes=3", "plan.views=3", "plan.teacher_rows_per_s=648", "plan.samples_per_s=10"]
    assert built.run("cache info", "-", EXACT, *plan) == 0
    printed = capsys.readouterr().out
    assert re.search(r"rows in all +648\n", printed)
    assert re.search(r"build, one accelerator at 648 rows/s +0\.000278 hours\n", printed)
    assert re.search(r"reading at 10 samples/s +200 bytes/s\n", printed)  # 3 logits and a sample id
    assert re.search(r"files +4\n", printed)
    for wrong, message in (
        (["plan.rows=10"], "plan.classes: must be given, as in plan.rows=1281167 plan.classes=1000"),
        ([*plan, "plan.epochs=3"], "plan.epochs=3: expected a number above 0 for one of plan.rows, "),
        ([*plan, "plan.rows=none"], "plan.rows=none: expected a number above 0"),
        ([*plan, "plan.rows=inf"], "plan.rows=inf: expected a number above 0"),
        ([*plan, "plan.classes=2.5"], "plan.classes=2.5: expected a whole number"),
        ([*plan, "cache=topk", "cache.k=4"], "cache.k=4 is more than the 3 classes there are"),
    ):
        assert built.run("cache info", "-", *wrong) == 2
        assert message in capsys.readouterr().err


def test_prune(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    folder = cache_of(place)
    begun, damaged = place.caches / ("0" * 16), place.caches / ("f" * 16)
    for other in (begun, damaged):
        shutil.copytree(folder, other)
    (begun / "manifest.json").unlink()
    (begun / "notes.txt").write_text("mine")
    (damaged / "manifest.json").write_text("{}")
    (place.caches / "thesis").mkdir()
    (place.caches / "thesis" / "chapter.tex").write_text("mine")
    assert place.run("cache prune", "-") == 2
    assert "cache prune needs name=NAME of a cache, or name=incomplete" in capsys.readouterr().err
    assert place.run("cache prune", "-", "name=thesis") == 2
    assert "holds no cache thesis; there are: " in capsys.readouterr().err
    assert place.run("cache prune", "-", "name=incomplete") == 0
    printed = capsys.readouterr().out
    assert f"deleted {begun.name}, " in printed
    assert f"deleted {damaged.name}, " in printed
    assert "left, because no build has made them: notes.txt" in printed
    assert [path.name for path in begun.rglob("*") if path.is_file()] == ["notes.txt"]
    assert not damaged.exists()
    assert place.run("cache verify", "-", *VIEWS, EXACT) == 0
    capsys.readouterr()
    assert place.run("cache prune", "-", "name=incomplete") == 0
    assert "nothing to delete" in capsys.readouterr().out
    assert place.run("cache prune", "-", f"name={folder.name}") == 0
    assert not folder.exists()
    assert (place.caches / "thesis" / "chapter.tex").read_text() == "mine"
    assert place.run("cache prune", "-", f"name={folder.name}") == 2
