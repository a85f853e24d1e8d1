"""The teacher of a command's own process: of the precision, and on the device, that its logits are kept under."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.config.schema import Config
from pipeline.data.sources.digits import DigitsParams
from pipeline.execution.logits import teacher_here
from pipeline.execution.teacher import compute_dtype
from pipeline.models import build_classifier
from pipeline.models.small_cnn import SmallCNNParams
from tests.unit.runs import build

SOURCE = DigitsParams().open()
BLOCK = np.arange(64, dtype=np.uint8).reshape(1, 1, 8, 8)


def config_of(folder: Path, *overrides: str) -> Config:
    torch.manual_seed(0)
    path = folder / "weights.safetensors"
    save_file(build_classifier(SmallCNNParams(width=4), SOURCE.spec).network.state_dict(), path)
    return build(f"teacher.checkpoint={path}", "teacher.width=4", "train.batch_size=8", *overrides)


@pytest.mark.parametrize(
    ("overrides", "precision"),
    [
        (["cluster=ray"], "fp32"),
        (["cluster=ray", "teacher.pool.num_gpus=0.5"], "bf16"),
        (["cluster=driver", "teacher.pool.num_gpus=1", "teacher.precision=fp32"], "fp32"),
        (["cluster=inprocess"], "bf16" if torch.cuda.is_available() else "fp32"),
    ],
)
def test_precision_is_that_of_the_pool_whatever_this_process_has(
    overrides: list[str], precision: str, tmp_path: Path
) -> None:
    config = config_of(tmp_path, *overrides)
    assert compute_dtype(config) == precision
    logits = {
        given: teacher_here(config_of(tmp_path, *overrides, f"teacher.precision={given}"), SOURCE)(BLOCK)
        for given in ("fp32", "bf16")
    }
    assert not np.array_equal(logits["fp32"], logits["bf16"])
    assert np.array_equal(teacher_here(config, SOURCE)(BLOCK), logits[precision])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU that is only claimed here is there")
def test_a_pool_without_gpus_keeps_the_teacher_off_the_gpu_that_ray_does_not_hide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert teacher_here(config_of(tmp_path, "cluster=ray"), SOURCE)(BLOCK).shape == (1, 10)
    with pytest.raises((RuntimeError, AssertionError), match=r"NVIDIA|CUDA"):
        teacher_here(config_of(tmp_path, "cluster=inprocess"), SOURCE)
