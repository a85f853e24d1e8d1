"""Weights on disk, and the teacher that runs them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from pydantic import ValidationError, create_model
from torch import Tensor, nn

from pipeline.contracts.columns import InputSpec
from pipeline.errors import CheckpointError, ModelError
from pipeline.models import (
    ModelCard,
    ModelParams,
    PoolParams,
    Teacher,
    TeacherParams,
    build_classifier,
    fingerprint_state,
    load_checkpoint,
    load_weights,
    read_card,
    resolve_checkpoint,
    save_model,
)
from pipeline.models.mlp import MLPParams
from pipeline.models.small_cnn import SmallCNNParams

TEN = tuple(f"class {k}" for k in range(10))
DIGITS = InputSpec("image", (1, 8, 8), TEN)
FEATURES = InputSpec("features", (5,), ("no", "yes", "maybe"))

CNN = SmallCNNParams(width=4)


def images(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, *DIGITS.shape), dtype=np.uint8)


def saved(folder: Path, params: ModelParams = CNN, spec: InputSpec = DIGITS) -> Path:
    """A finished run's folder with a model of random weights."""
    classifier = build_classifier(params, spec)
    save_model(folder / "model", classifier, ModelCard.describe(params, classifier, {"val/top1": 0.5}, "data1"))
    return folder


# --- weights ----------------------------------------------------------------------------------------------------


def test_a_fingerprint_covers_names_types_shapes_and_bytes_but_no_order() -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3), "c": torch.tensor([True]), "d": torch.empty(0)}
    fingerprint = fingerprint_state(state)
    assert re.fullmatch("[0-9a-f]{16}", fingerprint)
    assert fingerprint == fingerprint_state(dict(reversed(state.items())))
    assert fingerprint == fingerprint_state(state | {"a": state["a"].T.contiguous().T})
    others = [
        state | {"a": state["a"] + 1e-6},
        state | {"a": state["a"].reshape(3, 2)},
        state | {"a": state["a"].view(torch.int32)},
        state | {"b": torch.tensor(4)},
        {name: tensor for name, tensor in state.items() if name != "d"},
        {name.replace("a", "e"): tensor for name, tensor in state.items()},
    ]
    assert len({fingerprint, *map(fingerprint_state, others)}) == 1 + len(others)


SAVERS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "weights.safetensors": safetensors.torch.save_file,
    "bare.pt": torch.save,
    "legacy.pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "lightning.ckpt": lambda state, path: torch.save({"state_dict": state, "epoch": 3}, path),
    "wrapped.pt": lambda state, path: torch.save({"model": state, "optimizer": {"lr": 0.1}}, path),
    "parallel.pt": lambda state, path: torch.save({f"module.{name}": t for name, t in state.items()}, path),
}


@pytest.mark.parametrize("name", SAVERS)
def test_weights_load_from_every_common_form(name: str, tmp_path: Path) -> None:
    source, target = CNN.build_network(DIGITS), CNN.build_network(DIGITS)
    SAVERS[name](source.state_dict(), tmp_path / name)
    assert fingerprint_state(source.state_dict()) != fingerprint_state(target.state_dict())
    load_weights(target, tmp_path / name)
    assert fingerprint_state(source.state_dict()) == fingerprint_state(target.state_dict())


def test_a_network_with_a_module_of_its_own_keeps_the_prefix(tmp_path: Path) -> None:
    network = nn.Module()
    network.add_module("module", nn.Linear(2, 2))
    torch.save(network.state_dict(), tmp_path / "w.pt")
    load_weights(network, tmp_path / "w.pt")


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def cut(state: dict[str, Tensor], path: Path, save: Callable[..., None]) -> None:
    save(state, path)
    path.write_bytes(path.read_bytes()[:-100])


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor], Path], Any], str]] = {
    "missing.pt": (lambda state, path: None, r"missing\.pt is not a file"),
    "folder.pt": (lambda state, path: path.mkdir(), r"folder\.pt is not a file"),
    "empty.pt": (lambda state, path: path.touch(), r"\(0 bytes\) cannot be read"),
    "text.pt": (lambda state, path: path.write_text("hello world"), r"truncated or not a file of weights"),
    "cut.pt": (lambda state, path: cut(state, path, torch.save), r"truncated or not a file of weights"),
    "cut.safetensors": (
        lambda state, path: cut(state, path, safetensors.torch.save_file),
        r"truncated or not a file of weights",
    ),
    "empty.safetensors": (lambda state, path: path.touch(), r"\(0 bytes\) cannot be read"),
    "bomb.pt": (
        lambda state, path: torch.save(state | {"x": Bomb(path.parent / "boom")}, path),
        r"Python objects besides tensors, which could run code",
    ),
    "module.pt": (lambda state, path: torch.save(nn.Linear(2, 2), path), r"Python objects besides tensors"),
    "list.pt": (lambda state, path: torch.save([1, 2], path), r"holds a list, expected a state dict"),
    "numbers.pt": (lambda state, path: torch.save(state | {"epoch": 3}, path), r"holds a dict with epoch, expected"),
    "one_missing.pt": (
        lambda state, path: torch.save({name: state[name] for name in list(state)[1:]}, path),
        r"of the network's 20 tensors it lacks 1 \(0\.weight\);",
    ),
    "foreign.pt": (
        lambda state, path: torch.save({f"net.{name}": tensor for name, tensor in state.items()}, path),
        r"lacks 20 \(0\.weight, 1\.weight, 1\.bias, \.\.\.\) and has besides 20 \(net\.0\.weight, ",
    ),
    "wider.pt": (
        lambda state, path: torch.save(state | {"13.weight": torch.zeros(5, 16), "13.bias": torch.zeros(5)}, path),
        r"2 tensors of another shape: 13\.weight \(5, 16\), expected \(10, 16\), 13\.bias \(5,\), expected \(10,\);",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_weights_that_do_not_fit_are_refused_in_one_sentence_and_leave_the_network_alone(
    name: str, tmp_path: Path
) -> None:
    network = CNN.build_network(DIGITS)
    other = {name: tensor + 1 for name, tensor in network.state_dict().items()}
    before = fingerprint_state(network.state_dict())
    save, message = BROKEN[name]
    save(other, tmp_path / name)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_weights(network, tmp_path / name)
    assert "\n" not in caught.value.message
    assert "weights_only=False" not in caught.value.message
    assert str(tmp_path / name) in caught.value.message
    assert fingerprint_state(network.state_dict()) == before
    assert not (tmp_path / "boom").exists()


def test_a_saved_model_loads_again_and_replaces_an_older_one(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "model"
    for params in (MLPParams(), SmallCNNParams(width=3, mean=(0.25,))):
        classifier = build_classifier(params, DIGITS).eval()
        card = ModelCard.describe(params, classifier, {"val/top1": 0.75}, "data1")
        save_model(folder, classifier, card)
        assert read_card(folder) == card
        restored = build_classifier(params, DIGITS).eval()
        load_weights(restored.network, folder / "model.safetensors")
        pixels = torch.from_numpy(images(4))
        assert torch.equal(restored(pixels), classifier(pixels))
    assert card.params == {"name": "small_cnn", "width": 3}
    assert (card.mean, card.std) == ([0.25], [0.5])
    assert InputSpec.from_dict(card.input) == DIGITS
    assert card.fingerprint == fingerprint_state(classifier.network.state_dict())
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]


def test_tied_weights_can_be_saved(tmp_path: Path) -> None:
    classifier = build_classifier(MLPParams(hidden=(5, 5)), FEATURES)
    layers = classifier.network
    assert isinstance(layers, nn.Sequential)
    layers[4].weight = nn.Parameter(torch.ones(5, 5))
    layers[1].weight = layers[4].weight
    save_model(tmp_path / "m", classifier, ModelCard.describe(MLPParams(), classifier, {}, "d"))
    load_weights(layers, tmp_path / "m" / "model.safetensors")


def test_a_save_that_fails_leaves_the_older_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path) / "model"
    card = read_card(folder)

    def fails(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        saved(tmp_path)
    assert read_card(folder) == card
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_checkpoint_is_a_file_a_model_folder_or_a_run(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    weights = run / "model" / "model.safetensors"
    assert [resolve_checkpoint(str(path)) for path in (run, run / "model", weights)] == [weights] * 3

    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    with pytest.raises(
        CheckpointError, match=r"unfinished has neither model\.safetensors nor model/model\.safetensors"
    ):
        resolve_checkpoint(str(unfinished))
    (unfinished / "config.yaml").touch()
    with pytest.raises(CheckpointError, match=r"has not finished, .* resume=.*unfinished\."):
        resolve_checkpoint(str(unfinished))
    with pytest.raises(CheckpointError, match=r"nowhere does not exist"):
        resolve_checkpoint(str(tmp_path / "nowhere"))


def test_a_card_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.json cannot be read \(FileNotFoundError"):
        read_card(tmp_path)
    for content in ("{", "[]", '{"params": {}}'):
        (tmp_path / "model.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"model\.json cannot be read"):
            read_card(tmp_path)


def renamed(*names: str) -> InputSpec:
    return InputSpec("image", (1, 8, 8), names)


@pytest.mark.parametrize(
    ("params", "spec", "message"),
    [
        (MLPParams(), DIGITS, r"is of model 'small_cnn' but the teacher is 'mlp': give teacher=small_cnn,"),
        (SmallCNNParams(width=8), DIGITS, r"with width=4 but the teacher has width=8: give teacher\.width=4,"),
        (SmallCNNParams(width=4, mean=(0.1,)), DIGITS, r"with mean=\[0\.5\] but .* give teacher\.mean=\[0\.5\],"),
        (CNN, renamed("a", "b"), r"tells 10 classes apart but the data has 2"),
        (CNN, renamed(*reversed(TEN)), r"numbers the classes in another order \(class 0, class 1, class 2, \.\.\.\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_the_field(
    params: ModelParams, spec: InputSpec, message: str, tmp_path: Path
) -> None:
    run = saved(tmp_path)
    given = params.model_copy(update={"checkpoint": str(run)})
    classifier = build_classifier(given, spec)
    before = fingerprint_state(classifier.network.state_dict())
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(classifier, given, role="teacher")
    assert fingerprint_state(classifier.network.state_dict()) == before


def test_weights_changed_after_they_were_written_are_refused(tmp_path: Path) -> None:
    weights = saved(tmp_path) / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    params = SmallCNNParams(width=4, checkpoint=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"has fingerprint \w{16} but its card says \w{16}"):
        load_checkpoint(build_classifier(params, DIGITS), params, role="student")


# --- teacher ----------------------------------------------------------------------------------------------------


def teacher_params(checkpoint: Path | None, **settings: Any) -> ModelParams:
    """As the configuration makes them: a model's parameters and a teacher's in one."""
    combined = create_model("TeacherSmallCNNParams", __base__=(SmallCNNParams, TeacherParams))
    return combined(width=4, checkpoint=checkpoint and str(checkpoint), **settings)


def test_a_rows_logits_do_not_depend_on_how_many_come_with_it(tmp_path: Path) -> None:
    teacher = Teacher(teacher_params(saved(tmp_path)), DIGITS, batch_size=8)
    pixels = images(20)
    pixels.setflags(write=False)  # as Ray hands them out
    whole = teacher(pixels)
    assert whole.shape == (20, 10)
    assert whole.dtype == np.float32
    for rows in (1, 3, 7, 8, 9, 16, 19):
        np.testing.assert_array_equal(teacher(pixels[:rows]), whole[:rows])
    np.testing.assert_array_equal(teacher(pixels[8:13]), whole[8:13])
    assert teacher(pixels[:0]).shape == (0, 10)
    assert teacher.rows_forwarded == 20 + 63 + 5

    classifier = build_classifier(CNN, DIGITS).eval()
    load_weights(classifier.network, tmp_path / "model" / "model.safetensors")
    with torch.no_grad():
        np.testing.assert_allclose(whole, classifier(torch.tensor(pixels)).numpy(), atol=1e-6)
    assert teacher.fingerprint == read_card(tmp_path / "model").fingerprint


def test_a_teacher_always_runs_full_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Teacher(teacher_params(saved(tmp_path)), DIGITS, batch_size=8)
    sizes: list[int] = []
    forward = nn.Linear.forward

    def spy(self: nn.Linear, inputs: Tensor) -> Tensor:
        sizes.append(len(inputs))
        return forward(self, inputs)

    monkeypatch.setattr(nn.Linear, "forward", spy)
    teacher(images(11))
    teacher(images(2))
    assert sizes == [8, 8, 8]


def test_a_teacher_may_run_in_bf16_and_take_features(tmp_path: Path) -> None:
    run = saved(tmp_path / "cnn")
    pixels = images(8)
    exact = Teacher(teacher_params(run, precision="fp32"), DIGITS, 8)(pixels)
    coarse = Teacher(teacher_params(run, precision="bf16"), DIGITS, 8)(pixels)
    assert coarse.dtype == np.float32
    assert 0 < np.abs(coarse - exact).max() < 0.1
    np.testing.assert_array_equal(Teacher(teacher_params(run), DIGITS, 8)(pixels), exact)  # auto, on a CPU

    plain = MLPParams(checkpoint=str(saved(tmp_path / "mlp", MLPParams(), FEATURES)))
    assert Teacher(plain, FEATURES, 4)(np.ones((6, 5), np.float32)).shape == (6, 3)


def test_a_teacher_needs_a_checkpoint_that_is_its_own(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"teacher\.checkpoint is not set: train one with `train-teacher`"):
        Teacher(teacher_params(None), DIGITS, 8)
    with pytest.raises(CheckpointError, match=r"give teacher\.width=6"):
        Teacher(teacher_params(saved(tmp_path, SmallCNNParams(width=6))), DIGITS, 8)


def test_a_teacher_refuses_what_it_cannot_answer(tmp_path: Path) -> None:
    teacher = Teacher(teacher_params(saved(tmp_path / "good")), DIGITS, 8)
    for wrong in (np.zeros((2, 3, 32, 32), np.uint8), images(2).astype(np.float32)):
        with pytest.raises(ModelError, match=r"expected uint8 of shape \(rows, 1, 8, 8\)"):
            teacher(wrong)

    params = MLPParams(hidden=())
    classifier = build_classifier(params, FEATURES)
    save_model(tmp_path / "m", classifier, ModelCard.describe(params, classifier, {}, "d"))
    linear = Teacher(MLPParams(hidden=(), checkpoint=str(tmp_path / "m")), FEATURES, 4)
    rows = np.ones((6, 5), np.float32)
    rows[[1, 5]] = np.nan
    with pytest.raises(ModelError, match="not finite in 2 of 6 rows"):
        linear(rows)
    assert linear.rows_forwarded == 0


def test_pool_and_teacher_parameters_have_bounds() -> None:
    assert PoolParams(min=2, max=2).num_cpus == 1
    for values in ({"min": 0}, {"min": 3, "max": 2}, {"num_gpus": -1}, {"no_progress_timeout_s": 0}, {"size": 2}):
        with pytest.raises(ValidationError):
            PoolParams.model_validate(values)
    with pytest.raises(ValidationError):
        TeacherParams.model_validate({"source": "offline"})
