"""select-perturbation and loss.perturbation_from=auto, in one process: what is selected, kept, taken and refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from matplotlib.image import imread

from pipeline.cli.main import main
from pipeline.contracts.columns import NO_LABEL
from pipeline.contracts.events import Journal, read_events
from pipeline.data.logits import load_logits, save_logits
from pipeline.data.sources.digits import DigitsParams
from pipeline.evaluation import SelectionParams
from pipeline.evaluation.perturbation_selection import select_perturbation
from pipeline.execution.selection import read_selection, select
from pipeline.losses import Perturbation
from pipeline.losses.combined import CombinedParams
from pipeline.losses.objective import Objective, Signals
from pipeline.losses.ptloss import PTLossParams
from pipeline.tracking.quiet import import_mlflow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train-teacher", *SMALL, f"run.dir={folder / 'teacher'}"]) == 0
    return folder


SMALL = ["teacher=mlp", "teacher.hidden=[16]", "train.epochs=2", "data.validation_fraction=0.3", "cluster=inprocess"]


def run(command: str, runs: Path, name: str, *overrides: str) -> int:
    teacher = [f"teacher.checkpoint={runs / 'teacher'}", "student=mlp", "student.hidden=[8]"]
    return main([command, *SMALL, *teacher, f"run.dir={runs / name}", *overrides])


def test_the_command_leaves_what_it_chose(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("select-perturbation", runs, "selected", "selection.num_candidates=64") == 0
    printed = capsys.readouterr().out
    folder = runs / "selected" / "selection"
    selection = read_selection(runs / "selected")

    # The same as by hand, from the logits that were kept and the labels.
    validation = DigitsParams(validation_fraction=0.3).open().split("validation")
    (kept,) = (runs / "teacher_logits").rglob("validation-*.npy")
    by_hand = select_perturbation(load_logits(kept), validation.read_labels(), SelectionParams(num_candidates=64))
    assert selection == by_hand
    assert selection.num_rows == validation.num_rows == 539
    assert Perturbation.read(folder / "perturbation.json") == Perturbation.read(runs / "selected")
    assert Perturbation.read(runs / "selected") == selection.perturbation

    assert selection.verdict in printed
    assert (folder / "selection.txt").read_text() in printed
    assert max(map(len, (folder / "selection.txt").read_text().split("\n\n")[1].splitlines())) <= 100
    with (folder / "candidates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(selection.candidates)
    assert float(rows[0]["eps_1"]) == selection.candidates[0].coefficients[0]
    assert float(rows[0]["gain_low"]) == selection.candidates[0].gain.low
    for plot in ("candidates.png", "reliability.png"):
        picture = imread(folder / plot)
        assert picture.std() > 0.05  # something is drawn

    result = json.loads((runs / "selected" / "result.json").read_text())
    assert result["beats_zero"] is selection.beats_zero
    assert result["metrics"]["selection/gain"] == selection.scores[-1].gain.mean
    assert printed.rstrip().endswith(str(runs / "selected" / "result.json"))

    client = import_mlflow().MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    tracked = client.get_run(result["mlflow_run_id"])
    assert tracked.data.metrics["selection/gain"] == pytest.approx(selection.scores[-1].gain.mean)
    assert tracked.data.tags["summary"] == selection.verdict
    stored = {item.path for item in client.list_artifacts(result["mlflow_run_id"], "selection") if not item.is_dir}
    assert stored == {f"selection/{path.name}" for path in folder.iterdir() if path.is_file()}

    assert run("select-perturbation", runs, "selected", "selection.num_candidates=64") == 0
    again = capsys.readouterr().out
    assert "is finished" in again
    assert "extends" not in again
    assert (folder / "selection.txt").read_text() in again


def test_the_choice_is_a_configuration(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("select-perturbation", runs, "chosen", "selection.num_candidates=16") == 0
    conf = runs / "chosen" / "selection" / "conf"
    assert f"--conf {conf} loss=ptloss_selected" in capsys.readouterr().out
    assert run("distill", runs, "by-choice", "--conf", str(conf), "loss=ptloss_selected") == 0
    stored = yaml.safe_load((runs / "by-choice" / "config.yaml").read_text())
    selected = read_selection(runs / "chosen").perturbation
    assert stored["loss"]["selected"] == selected.model_dump(mode="json")
    capsys.readouterr()


def test_auto_selects_at_the_start_and_keeps_it(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    auto = ["loss=ptloss", "loss.perturbation_from=auto", "selection.num_candidates=16"]
    assert run("distill", runs, "auto", *auto) == 0
    selection = read_selection(runs / "auto")
    assert selection.verdict in capsys.readouterr().out
    assert run("distill", runs, "by-hand", "loss=ptloss", f"loss.perturbation_from={runs / 'auto'}") == 0
    metrics = [json.loads((runs / name / "result.json").read_text())["metrics"] for name in ("auto", "by-hand")]
    assert metrics[0] == metrics[1]

    # Gone on with: what was selected stays, even if it would now come out otherwise.
    kept = selection.perturbation.model_copy(update={"coefficients": ((2.0, 0.0, 0.0, 0.0, 0.0),)})
    (runs / "auto" / "selection" / "selection.json").write_text(
        selection.model_copy(update={"perturbation": kept}).model_dump_json()
    )
    capsys.readouterr()
    assert main(["distill", f"resume={runs / 'auto'}", "train.epochs=+1"]) == 0
    assert "selection started" not in capsys.readouterr().out
    losses = [
        [
            event.data["metrics"]["train/ptloss"]
            for event, _ in read_events(runs / name / "events.jsonl")
            if event.kind == "step"
        ]
        for name in ("auto", "by-hand")
    ]
    assert len(losses[0]) > len(losses[1])


def test_a_part_of_a_loss_may_want_coefficients() -> None:
    torch.manual_seed(0)
    signals = Signals(torch.randn(8, 4), None, torch.randn(8, 4))
    chosen = Perturbation.shared((0.5, -0.25))
    combined = CombinedParams(parts={"ptloss": {"perturbation_from": "auto"}, "logit_mse": {}}, ce_weight=0)
    assert combined.wants_perturbation
    with pytest.raises(Exception, match="no coefficients were selected"):
        Objective(combined)(signals)
    _, logged = Objective(combined.with_perturbation(chosen))(signals)
    _, expected = Objective(PTLossParams(perturbation=(0.5, -0.25)))(signals)
    assert logged["ptloss/ptloss"] == expected["ptloss"]
    assert not combined.with_perturbation(chosen).wants_perturbation


def test_the_teacher_is_softened_before_it_is_perturbed() -> None:
    torch.manual_seed(1)
    student, teacher = torch.randn(8, 4), torch.randn(8, 4)
    softened = Perturbation(coefficients=((0.5, -0.25),), teacher_temperature=2.0)
    _, logged = Objective(PTLossParams(perturbation_from="p.json", selected=softened))(Signals(student, None, teacher))
    _, expected = Objective(PTLossParams(perturbation=(0.5, -0.25)))(Signals(student, None, teacher / 2))
    assert logged["ptloss"] == expected["ptloss"]


def test_rows_that_were_skipped_have_no_part(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(300, 5)).astype(np.float32), generator.integers(5, size=300)
    with_bad = np.insert(logits, 7, np.nan, axis=0)
    save_logits(tmp_path / "logits.npy", with_bad)
    reader = SimpleNamespace(read_labels=lambda: np.insert(labels, 7, NO_LABEL))
    session = SimpleNamespace(
        run=SimpleNamespace(dir=tmp_path), journal=Journal(tmp_path / "events.jsonl"), say=lambda *_, **__: None
    )
    params = SelectionParams(num_candidates=8, num_resamples=100)
    source = SimpleNamespace(split=lambda name: reader)
    found = select(params, source, tmp_path / "logits.npy", session)  # type: ignore[arg-type]
    assert found == select_perturbation(logits, labels, params)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.temperature=2"], "leave temperature at 1"),
        (["loss.standardise=true"], "standardise off"),
        (["loss.schedule.temperature={to: 2}"], "leave temperature at 1"),
        (["loss.perturbation=[0.5]"], "are both set"),
        (["data.validation_fraction=0.02"], "validation rows are too few"),
        (["selection.scope=group", "selection.group_by=superclass", "selection.class_groups=[0,1]"], "has 2 numbers"),
    ],
)
def test_what_cannot_be_selected_is_refused_before_work(
    runs: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("distill", runs, "refused", "loss=ptloss", "loss.perturbation_from=auto", *overrides) == 2
    assert message in capsys.readouterr().err
    assert not (runs / "refused").exists()


def test_the_command_wants_a_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["select-perturbation", "cluster=inprocess"]) == 2
    assert "teacher.checkpoint: not set, but select-perturbation asks one" in capsys.readouterr().err
    # Rules of training are none of its business.
    assert main(["select-perturbation", "cluster=inprocess", "cluster.num_workers=2", "train.select_by=no"]) == 2
    assert "cluster.num_workers" not in capsys.readouterr().err
