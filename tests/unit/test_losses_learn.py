"""Every loss distils digits through the training loop, and by what the teacher says of each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.contracts.events import Event
from pipeline.data.sources.digits import DigitsParams
from pipeline.evaluation import EvaluationParams
from pipeline.losses import LOSSES, LossParams
from pipeline.losses.cross_entropy import CrossEntropyParams
from pipeline.losses.kd import KDParams
from pipeline.losses.levels import LevelsParams
from pipeline.models import Classifier, class_similarity
from pipeline.models.mlp import MLPParams
from pipeline.training import (
    InProcessSource,
    LocalContext,
    OptimizerParams,
    RunSpec,
    TrainParams,
    build_job,
    make_plan,
    make_planner,
    open_training,
    train,
)
from tests.recorder import Recorder

DATA = DigitsParams()
SOURCE = DATA.open()
TRAIN = TrainParams(epochs=5, batch_size=64, blocks_per_step=1, log_every=5, optimizer=OptimizerParams(lr=0.02))
STUDENT, TEACHER = MLPParams(hidden=(32,)), MLPParams(hidden=(256,))
# The size of the gradient differs between losses by orders of magnitude; its norm is bounded for all alike.
CLIPPED = TRAIN.model_copy(update={"optimizer": TRAIN.optimizer.model_copy(update={"clip_grad_norm": 1.0, "lr": 0.1})})
LEVELS = ("label_smoothing", "class_similarity", "partial_and_similarity", "topk")
CASES: dict[str, LossParams] = {
    **{name: params() for name, params in LOSSES.entries().items() if name != "cross_entropy"},
    **{f"levels-{level}": LevelsParams(level=level) for level in LEVELS},
    "kd-standardised": KDParams(standardise=True, temperature=2.0),
    "kd-scheduled": KDParams(schedule={"temperature": {"to": 1.0}, "kd_weight": {"to": 0.5}}),
}
Forward = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fit(
    loss: LossParams, folder: Path, network: MLPParams = STUDENT, teacher: Forward | None = None
) -> tuple[Classifier, float, list[Event]]:
    """The network, its accuracy on validation after the last epoch, and the events."""
    similarity = class_similarity(_teacher()) if "last_layer" in loss.needs else None
    params = TRAIN if network is TEACHER else CLIPPED
    planner = make_planner(DATA, open_training(SOURCE), params, 0)
    plan = make_plan(planner, params)
    spec = RunSpec(DATA, network, loss, params, EvaluationParams(), 0, plan, class_similarity=similarity)
    blocks = InProcessSource(SOURCE, open_training(SOURCE), planner, DATA, 0, plan.num_blocks, teacher)  # type: ignore[arg-type]
    recorder = Recorder()
    state = train(build_job(spec, SOURCE), LocalContext(folder, recorder, torch.device("cpu")), blocks)
    return state.classifier, state.last_metrics["val/top1"], recorder.events


_TEACHERS: list[Classifier] = []


def _teacher() -> Classifier:
    return _TEACHERS[0]


@pytest.fixture(autouse=True, scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> float:
    """A teacher for the module, and the accuracy of the student on labels alone."""
    classifier, accuracy, _ = fit(CrossEntropyParams(), tmp_path_factory.mktemp("teacher"), TEACHER)
    assert accuracy > 0.9
    _TEACHERS[:] = [classifier.eval()]
    return fit(CrossEntropyParams(), tmp_path_factory.mktemp("alone"))[1]


@torch.no_grad()
def forward(inputs: np.ndarray) -> np.ndarray:
    return _teacher()(torch.from_numpy(inputs)).numpy()


def shuffled(inputs: np.ndarray) -> np.ndarray:
    return forward(inputs)[np.random.default_rng(len(inputs)).permutation(len(inputs))]


def without_labels(params: LossParams) -> LossParams:
    return params.model_copy(update={"ce_weight": 0.0})


@pytest.mark.parametrize("name", CASES)
def test_every_loss_learns_and_its_terms_fall(name: str, taught: float, tmp_path: Path) -> None:
    params = CASES[name]
    _, accuracy, events = fit(params, tmp_path, teacher=forward)
    assert accuracy >= 0.9 * taught
    steps = [event.data["metrics"] for event in events if event.kind == "step"]
    for term in params.terms():
        if term.weight > 0:
            first, last = steps[0][f"train/{term.name}"], steps[-1][f"train/{term.name}"]
            assert last < first, term.name


# Half of its targets are the label's class and nothing of the row, which alone teaches as well.
BY_LABEL = "levels-partial_and_similarity"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "full" in case.needs and name != BY_LABEL])
def test_rows_of_others_teach_worse(name: str, tmp_path: Path) -> None:
    params = without_labels(CASES[name])
    _, right, _ = fit(params, tmp_path / "right", teacher=forward)
    _, wrong, _ = fit(params, tmp_path / "wrong", teacher=shuffled)
    assert wrong < right - 0.2
