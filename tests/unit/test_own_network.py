"""A network of the user's own goes where its model goes: kept with the run, tried before the run is finished."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cli.main import main
from pipeline.config.load import load_config, load_stored
from pipeline.config.own_code import kept_code
from pipeline.config.request import Request
from pipeline.config.runs import Run, open_run, settle
from pipeline.config.stored import hash_config, read_run
from pipeline.contracts.columns import InputSpec
from pipeline.contracts.events import read_events
from pipeline.errors import ModelError
from pipeline.execution import session, training
from pipeline.execution.work import collect_own_code
from pipeline.models import CustomParams, ModelCard, build_classifier, save_model
from pipeline.tracking import check
from pipeline.tracking.check import check_loads
from pipeline.tracking.fresh import find_reason
from pipeline.tracking.served import _load_pyfunc
from pipeline.trials.configs import TrialConfigs
from tests.unit.runs import TEACHER, build, load, open_and_close

SPEC = InputSpec("features", (4,), ("a", "b", "c"))
NETS = (
    "from torch import nn\n\nfrom my_layers import widen\n\n\n"
    "def build(spec, width=8):\n    size = spec.shape[-1] * spec.shape[-1] if len(spec.shape) == 3 else spec.shape[0]\n"
    "    return nn.Sequential(nn.Flatten(), nn.Linear(size, widen(width)), nn.Linear(widen(width), spec.num_classes))\n"
)
OWN = ("student=custom", "student.factory=my_nets:build")


@pytest.fixture(autouse=True)
def own_modules(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A factory and what it imports, in the current folder."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (working_folder / "my_nets.py").write_text(NETS)
    (working_folder / "my_layers.py").write_text("def widen(width):\n    return 2 * width\n")
    yield
    forget()


def forget() -> None:
    """What a process does that ends."""
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


def open_own(*overrides: str, command: str = "distill") -> Run:
    config = build("run.dir=runs/own", *OWN, *overrides, command=command)
    with open_run(command, config, code=lambda: collect_own_code([config], command)) as run:
        return run


# --- kept with the run --------------------------------------------------------------------------------------------


def test_a_run_keeps_the_modules_of_both_networks(working_folder: Path) -> None:
    run = open_own("teacher=custom", "teacher.factory=my_layers:widen")
    assert kept_code(run.dir) == {
        "teacher.code": str(run.dir / "code" / "teacher"),
        "student.code": str(run.dir / "code" / "student"),
    }
    assert {path.name for path in (run.dir / "code" / "teacher").iterdir()} == {"my_layers.py"}
    assert {path.name for path in (run.dir / "code" / "student").iterdir()} == {"my_layers.py", "my_nets.py"}
    assert (run.config.student.code, run.config.teacher.code) == tuple(  # type: ignore[attr-defined]
        str(run.dir / "code" / role) for role in ("student", "teacher")
    )
    fingerprints = run.read_provenance()["code"]
    assert set(fingerprints) == {"teacher", "student"}
    assert len(set(fingerprints.values())) == 2


def test_only_networks_that_are_built_are_kept(working_folder: Path) -> None:
    teacher = ("teacher=custom", "teacher.factory=no_such_module:build")
    run = open_own("loss=cross_entropy", *teacher)
    assert set(kept_code(run.dir)) == {"student.code"}
    other = build(
        "run.dir=runs/other", "teacher=custom", "teacher.factory=my_nets:build", *OWN[:1], "student.factory=no:no"
    )
    assert set(collect_own_code([other], "cache build")) == {"teacher"}
    assert open_and_close("run.dir=runs/plain").read_provenance().get("code") is None


def test_where_modules_are_is_no_part_of_what_a_run_computes(working_folder: Path) -> None:
    plain, placed = build(*OWN), build(*OWN, "student.code=elsewhere")
    assert open_own().config_hash == hash_config(settle(plain))
    assert plain.student.architecture() == placed.student.architecture()
    assert "code" not in plain.student.architecture()


def test_a_run_goes_on_with_what_it_keeps(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_own()
    elsewhere = working_folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    forget()
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(working_folder)])
    for config in (load_config(Request("distill", (f"resume={run.dir}",))).config, load_stored(read_run(run.dir), [])):
        build_classifier(config.student, SPEC)
        assert Path(sys.modules["my_nets"].__file__ or "") == run.dir / "code" / "student" / "my_nets.py"


def test_a_run_that_was_refused_keeps_nothing(working_folder: Path) -> None:
    """Neither does the next start take the modules that it was refused with."""
    run = open_own()
    run.write_result("failed", {}, exit_code=2, error="no room")
    (working_folder / "my_layers.py").write_text("def widen(width):\n    return 3 * width\n")
    loaded = load("run.dir=runs/own", TEACHER, *OWN)
    assert loaded.config.student.code is None  # type: ignore[attr-defined]
    open_own().discard()
    assert not run.dir.exists()


def test_a_trial_has_the_modules_of_its_search(working_folder: Path) -> None:
    space = "search.space={train: {optimizer: {lr: {distribution: uniform, low: 0.1, high: 0.2}}}}"
    given = ("search=temperature", space, "search.start=[]", "teacher.source=cached", "cache.path=cache")
    run = open_own(*given, command="search")
    trial = TrialConfigs(run.config).build(None, Path("trials/0001"), "0001")
    assert trial.student.code == str(run.dir / "code" / "student")  # type: ignore[attr-defined]
    with open_run("distill", trial) as opened:
        assert opened.config.student.code == trial.student.code  # type: ignore[attr-defined]


# --- the model ----------------------------------------------------------------------------------------------------


def save(folder: Path, params: CustomParams) -> np.ndarray:
    """A model of fresh weights; returns what it says of four rows of zeros and ones."""
    import torch

    classifier = build_classifier(params, SPEC).eval()
    save_model(folder, classifier, ModelCard.describe(params, classifier, {}, "data"), params.code_folder)
    with torch.inference_mode():
        probabilities: np.ndarray = classifier(torch.from_numpy(ROWS)).softmax(-1).numpy()
    return probabilities


ROWS = np.eye(4, dtype=np.float32)


def kept_params(folder: Path, **values: Any) -> CustomParams:
    """A network whose modules are kept in a folder of their own."""
    from pipeline.contracts.own_code import write_code

    params = CustomParams(factory="my_nets:build", **values)
    write_code(folder, params.collect_code())
    return params.model_copy(update={"code": str(folder)})


def test_the_logged_code_is_what_is_loaded(working_folder: Path) -> None:
    """As MLflow does it, in this process, which has another module of that name."""
    from pipeline.tracking.model import save_pyfunc

    expected = save(working_folder / "model", kept_params(working_folder / "kept"))
    save_pyfunc(working_folder / "logged", working_folder / "model")
    logged = working_folder / "logged"
    assert {entry.name for entry in (logged / "code").iterdir()} == {"my_layers.py", "my_nets.py", "pipeline"}
    assert {entry.name for entry in (logged / "data" / "model").iterdir()} == {"model.json", "model.safetensors"}
    (working_folder / "my_layers.py").write_text("def widen(width):\n    return 3 * width\n")
    forget()
    build_classifier(CustomParams(factory="my_nets:build"), SPEC)
    loaded = _load_pyfunc(str(logged / "data" / "model"))
    np.testing.assert_allclose(loaded.predict(ROWS), expected, atol=1e-6)


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """A script in place of the one that imports mlflow and torch, which takes seconds."""
    (folder / "stand_in.py").write_text(f"import os, sys\nimport numpy as np\n{code}\n")
    monkeypatch.setattr(check.fresh, "__file__", str(folder / "stand_in.py"))


def test_other_probabilities_are_refused(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = working_folder / "model"
    expected = save(model, kept_params(working_folder / "kept"))
    stand_in(working_folder, monkeypatch, "np.save(sys.argv[3], np.load(sys.argv[2])[:, :3])")
    check_loads(model, ROWS, ROWS[:, :3])
    with pytest.raises(ModelError, match=r"gives other probabilities .* \(by up to 0\.\d+ in 4 rows\)"):
        check_loads(model, ROWS, expected)
    with pytest.raises(ModelError, match=r"by up to inf in 4 rows"):
        check_loads(model, ROWS, expected[:, :2])


def test_a_process_that_dies_says_so(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(working_folder / "model", kept_params(working_folder / "kept"))
    stand_in(working_folder, monkeypatch, "print('no room', file=sys.stderr, flush=True); os._exit(9)")
    with pytest.raises(ModelError, match=r"\(exit code 9: no room\): .* here my_layers\.py, my_nets\.py, and nothing"):
        check_loads(working_folder / "model", ROWS, ROWS)


def test_the_fresh_process_does_not_find_the_modules_where_they_come_from(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(working_folder), "/usr/lib", ""]))
    assert check._environment(["my_nets.py"])["PYTHONPATH"] == "/usr/lib"


def test_the_reason_is_what_the_error_comes_of() -> None:
    cause = ModuleNotFoundError("No module named 'my_plugin'\nand more")
    error = ModelError("it cannot be built")
    error.__cause__ = cause
    assert find_reason(error) == "ModuleNotFoundError: No module named 'my_plugin'"


class NoTracker:
    """A tracker that sends nothing; making a database takes seconds."""

    run_id = problem = None
    is_away = False

    def close(self, timeout_s: float) -> bool:
        return True


def test_a_run_whose_model_does_not_load_is_not_finished(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise ModelError("it does not load")

    monkeypatch.setattr("pipeline.execution.work.check_fresh", lambda *_: None)
    monkeypatch.setattr(training, "check_kept", refuse)
    monkeypatch.setattr(session, "_open_tracker", lambda *_, **__: NoTracker())
    given = ["teacher=custom", "teacher.factory=my_nets:build", "train.epochs=1", "cluster=inprocess"]
    assert main(["train-teacher", "run.dir=runs/own", *given]) == 1
    run_dir = working_folder / "runs" / "own"
    assert json.loads((run_dir / "result.json").read_text())["status"] == "failed"
    events = [event for event, _ in read_events(run_dir / "events.jsonl")]
    assert "model" not in {event.kind for event in events}
    assert {path.name for path in (run_dir / "model" / "code").iterdir()} == {"my_layers.py", "my_nets.py"}
    assert "it does not load" in capsys.readouterr().err
