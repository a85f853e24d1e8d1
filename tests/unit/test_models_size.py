"""What belongs to a network besides its weights: the size and normalisation of its input, wherever it is rebuilt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from pipeline.config.compose import compose
from pipeline.config.validate import build_config
from pipeline.contracts.columns import InputSpec
from pipeline.data.sources.digits import DigitsParams
from pipeline.errors import CheckpointError
from pipeline.execution.teacher import check_teacher
from pipeline.models import ModelCard, Teacher, build_classifier, load_checkpoint, read_card, save_model
from pipeline.models.mlp import MLPParams
from pipeline.models.small_cnn import SmallCNNParams
from pipeline.tracking.served import _load_pyfunc

DIGITS = InputSpec("image", (1, 8, 8), tuple(f"class {k}" for k in range(10)))
LARGER = InputSpec("image", (1, 16, 12), DIGITS.class_names)
RESIZED = MLPParams(hidden=(5,), image_size=(16, 12))


def images(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, *DIGITS.shape), dtype=np.uint8)


def saved(folder: Path, params: MLPParams | SmallCNNParams = RESIZED) -> Path:
    classifier = build_classifier(params, DIGITS)
    save_model(folder / "model", classifier, ModelCard.describe(params, classifier, {}, "data1"))
    return folder


def test_a_card_has_the_size_and_a_served_model_resizes_as_the_trained_one_did(tmp_path: Path) -> None:
    card = read_card(saved(tmp_path) / "model")
    assert (card.image_size, card.mean, card.std) == ([16, 12], [0.5], [0.5])
    assert card.params == {"name": "mlp", "hidden": [5], "dropout": 0.0}
    teacher = Teacher(RESIZED.model_copy(update={"checkpoint": str(tmp_path)}), DIGITS, 4)
    pixels = images(6)
    expected = torch.from_numpy(teacher(pixels)).softmax(1).numpy()
    np.testing.assert_allclose(_load_pyfunc(str(tmp_path / "model")).predict(pixels), expected, atol=1e-6)


def test_a_card_from_before_sizes_has_none(tmp_path: Path) -> None:
    path = saved(tmp_path, SmallCNNParams(width=3)) / "model" / "model.json"
    values = json.loads(path.read_text())
    assert values.pop("image_size") is None
    path.write_text(json.dumps(values))
    assert read_card(path.parent).image_size is None


def test_a_checkpoint_of_another_size_is_refused_unless_the_data_has_it(tmp_path: Path) -> None:
    run = str(saved(tmp_path))
    for params, spec in ((RESIZED, DIGITS), (MLPParams(hidden=(5,)), LARGER), (RESIZED, LARGER)):
        given = params.model_copy(update={"checkpoint": run})
        load_checkpoint(build_classifier(given, spec), given, role="teacher")
    for size, said in ((None, r"\[8,8\]"), ((12, 16), r"\[12,16\]")):
        given = MLPParams(hidden=(5,), image_size=size, checkpoint=run)
        message = (
            rf"with image_size=\[16,12\] but the teacher has image_size={said}: give teacher.image_size=\[16,12\],"
        )
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(build_classifier(given, DIGITS), given, role="teacher")


def test_the_teachers_key_covers_its_preprocessing(tmp_path: Path) -> None:
    network = SmallCNNParams(width=4).build_network(DIGITS)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "w.safetensors")
    given = ["cluster=inprocess", "teacher.width=4", f"teacher.checkpoint={tmp_path}/w.safetensors"]

    source = DigitsParams().open()

    def key(*overrides: str) -> str:
        return check_teacher(build_config(compose([*given, *overrides]), "distill"), source).key

    changes = ["teacher.image_size=[16,16]", "teacher.image_size=[16,8]", "teacher.mean=[0.4]", "teacher.std=[0.4]"]
    keys = [key(), *map(key, changes)]
    assert len(set(keys)) == len(keys)
    assert key("teacher.mean=[0.5]") == keys[0]  # the default, given
