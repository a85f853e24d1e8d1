"""Searches over one small cache, and what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.config.results import read_run_id
from pipeline.data.sources.gaussians import GaussiansParams
from pipeline.models import build_classifier
from pipeline.models.mlp import MLPParams
from tests.integration.commands import mlflow_client

ROWS = 1_280  # a multiple of the batch: no row is computed to fill up a block
DATA = ["data=gaussians", f"data.num_train={ROWS}", "data.num_validation=500", "data.num_test=500"]
STUDENT = ["student=mlp", "student.hidden=[8]", "train.epochs=3", "train.optimizer.lr=0.05"]
CONFIRM = ["search.confirm.top=2", "search.confirm.seeds=2", "search.max_concurrent=2"]
WAIT_S = 300.0


def prepare(folder: Path) -> list[str]:
    """Overrides of runs with an untrained teacher."""
    torch.manual_seed(0)
    spec = GaussiansParams(num_train=ROWS, num_validation=500, num_test=500).open().spec
    torch.save(build_classifier(MLPParams(hidden=(16,)), spec).network.state_dict(), folder / "teacher.pt")
    teacher = ["teacher=mlp", "teacher.hidden=[16]", f"teacher.checkpoint={folder / 'teacher.pt'}"]
    return [*DATA, *STUDENT, *teacher, f"cache.path={folder / 'cache'}"]


def children(search: Path, client: Any = None) -> list[Any]:
    """The tracker's runs of a search's trials."""
    client = client or mlflow_client(f"sqlite:///{search.parent / 'mlflow.db'}")
    parent = read_run_id(search)
    experiment = client.get_experiment_by_name("distillation").experiment_id
    return client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent}'", max_results=1000)


def start_search(folder: Path, command: list[str]) -> subprocess.Popen[bytes]:
    with (folder / "search.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", *command],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )
