"""Run folders, caches and searches that earlier versions made are gone on with, read and shown; see ``fixtures``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.contracts.events import read_events
from pipeline.data.cache import Cache, decode_logits, load_logits, open_manifest
from pipeline.data.sources.digits import DigitsParams
from tests.integration.commands import Call, read_result

FIXTURES = Path(__file__).parents[1] / "fixtures"
CACHED = ["student=mlp", "student.hidden=[4]", "train.batch_size=16", "train.epochs=2", "teacher.source=cached"]


class Kept:
    """A copy of what one version left, elsewhere than where it was made."""

    def __init__(self, version: Path, folder: Path) -> None:
        self.folder = shutil.copytree(version, folder / version.name)
        self.expected: dict[str, Any] = json.loads((version / "expected.json").read_text())
        teacher = ["teacher=mlp", "teacher.hidden=[8]", f"teacher.checkpoint={self.folder / 'teacher'}"]
        self.taught = [*teacher, "data.test_fraction=0.8", "cluster=inprocess"]
        self.tracked = f"tracking.uri=sqlite:///{self.folder / 'mlflow.db'}"


@pytest.fixture(scope="module", params=sorted(path.name for path in FIXTURES.iterdir() if path.is_dir()))
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    return Kept(FIXTURES / request.param, tmp_path_factory.mktemp("kept"))


def close_to(metrics: dict[str, float]) -> Any:
    """Another processor adds in another order."""
    return pytest.approx(metrics, rel=1e-3, abs=0.02)


def test_a_run_that_was_interrupted_goes_on_to_where_that_version_ended(kept: Kept, call: Call) -> None:
    """Within an epoch, in another place, with its teacher in another place; and then two epochs further."""
    run = kept.folder / "run"
    moved = [f"resume={run}", f"teacher.checkpoint={kept.folder / 'teacher'}", kept.tracked]
    before = json.loads((run / "checkpoints" / "last" / "cursor.json").read_text())["step"]
    ended = call(kept.folder, "distill", *moved)
    assert ended.code == 0, ended.err
    result = read_result(run)
    assert (result["status"], result["best_step"]) == ("finished", kept.expected["run"]["best_step"])
    assert result["metrics"] == close_to(kept.expected["run"]["metrics"])
    events = [event for event, _ in read_events(run / "events.jsonl")]
    assert [event.data["start_step"] for event in events if event.kind == "plan"] == [0, before]
    last = [event.data for event in events if event.kind == "evaluation" and event.data["split"] == "validation"][-1]
    assert (last["step"], last["metrics"]) == (330, close_to(kept.expected["last_evaluation"]))


def test_a_finished_run_is_evaluated_and_predicts(kept: Kept, call: Call) -> None:
    teacher = kept.folder / "teacher"
    assert call(kept.folder, "evaluate", f"run={teacher}").code == 0
    assert read_result(teacher / "evaluate")["metrics"] == close_to(kept.expected["teacher"])
    assert call(kept.folder, "predict", f"run={teacher}", "out=labels.parquet", "cluster=inprocess").code == 0
    found = pq.read_table(kept.folder / "labels.parquet")["probabilities"].to_pylist()[:3]
    np.testing.assert_allclose(found, kept.expected["predictions"], atol=1e-4)


def test_a_finished_run_is_told_apart_from_an_unfinished_one(kept: Kept, call: Call) -> None:
    teacher = kept.folder / "teacher"
    again = call(kept.folder, "train-teacher", f"resume={teacher}", kept.tracked)
    assert again.code == 0
    assert f"{teacher} is finished; train.epochs=+N extends it" in again.out


def test_caches_hold_the_logits_that_were_put_into_them(kept: Kept) -> None:
    reader = DigitsParams(test_fraction=0.8).open().split("train")
    for name, logits in kept.expected["logits"].items():
        folder, manifest = open_manifest(str(kept.folder / "cache"), name)
        table = load_logits(Cache(folder, manifest, reader.rows)).read(0, np.array(kept.expected["sample_ids"]))
        np.testing.assert_allclose(decode_logits(table, 10, 4), logits, atol=1e-3)


@pytest.mark.parametrize("encoding", [[], ["cache=topk", "cache.k=3"]], ids=["dense", "topk"])
def test_caches_are_those_of_their_teacher_and_are_trained_on(kept: Kept, call: Call, encoding: list[str]) -> None:
    path = f"cache.path={kept.folder / 'cache'}"
    checked = call(kept.folder, "cache", "verify", *kept.taught, path, *encoding)
    assert checked.code == 0, checked.err
    name = "topk" if encoding else "dense"
    ended = call(kept.folder, "distill", *kept.taught, *CACHED, path, *encoding, kept.tracked, f"run.dir=cached-{name}")
    assert ended.code == 0, ended.err
    assert ended.out.count("teacher logits started: train") == 0
    assert read_result(kept.folder / f"cached-{name}")["metrics"] == close_to(kept.expected[f"cached {name}"])


def test_caches_are_listed(kept: Kept, call: Call) -> None:
    listed = call(kept.folder, "cache", "info", "cache.path=cache")
    assert listed.code == 0
    assert all(name in listed.out for name in kept.expected["logits"])


def test_a_search_is_shown_and_known_to_be_finished(kept: Kept, call: Call) -> None:
    search = kept.folder / "search"
    shown = call(kept.folder, "search", "show", f"run={search}")
    assert shown.code == 0, shown.err
    told = (search / "search" / "trials.txt").read_text() + (search / "search" / "confirmed.txt").read_text()
    found = [line.split() for line in shown.out.splitlines()]
    assert all(line.split() in found for line in told.splitlines())
    assert call(kept.folder, "search", "show", f"run={search}", "out=trials.csv").code == 0
    assert (kept.folder / "trials.csv").read_text() == (search / "search" / "trials.csv").read_text()
    moved = [f"teacher.checkpoint={kept.folder / 'teacher'}", f"cache.path={kept.folder / 'cache'}", kept.tracked]
    again = call(kept.folder, "search", f"resume={search}", *moved)
    assert again.code == 0, again.err
    assert f"{search} is finished; search.num_trials=+N extends it" in again.out


def test_the_winner_of_a_search_is_a_choice(kept: Kept, call: Call) -> None:
    conf = str(kept.folder / "search" / "winner" / "conf")
    ended = call(kept.folder, "validate", "--conf", conf, "experiment=winner", *kept.taught)
    assert ended.code == 0, ended.err
    assert f"temperature: {kept.expected['winner']}" in ended.out
