"""Mistakes with networks and their weights."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path

import torch

from pipeline.config.load import load_config
from pipeline.config.request import Request
from pipeline.config.runs import open_run
from pipeline.contracts.columns import InputSpec
from pipeline.execution.work import collect_own_code
from pipeline.models.mlp import MLPParams
from tests.integration.mistakes.table import Place, mistake

WEIGHTS = Path("model", "model.safetensors")
DIGITS = InputSpec("image", (1, 8, 8), tuple("0123456789"))


def save_mlp(place: Place, spec: InputSpec) -> Path:
    """Weights of ``teacher=mlp teacher.hidden=[8]`` without a card: nothing but names and shapes."""
    path = place.folder / "weights.pt"
    torch.save(MLPParams(hidden=(8,)).build_network(spec).state_dict(), path)
    return path


def own_teacher(place: Place, code: str, *overrides: str) -> list[str]:
    """``teacher=custom`` from a module with this code; its name is the case's own, as Python keeps modules."""
    module = f"networks_{place.folder.name}"
    (place.folder / f"{module}.py").write_text(code)
    return place.distill("teacher=custom", f"teacher.factory={module}:build", *overrides)


# --- checkpoints --------------------------------------------------------------------------------------------------


@mistake("a checkpoint that is not there")
def _(place: Place) -> list[str]:
    return place.distill("teacher.checkpoint=runs/nobody")


@mistake("a checkpoint on object storage")
def _(place: Place) -> list[str]:
    return place.distill("teacher.checkpoint=s3://models/teacher")


@mistake("a folder without weights as checkpoint")
def _(place: Place) -> list[str]:
    (place.folder / "empty").mkdir()
    return place.distill("teacher.checkpoint=empty")


@mistake("the checkpoint of an unfinished run")
def _(place: Place) -> list[str]:
    shutil.copytree(place.teacher, place.folder / "runs" / "half", ignore=shutil.ignore_patterns("model"))
    return place.distill("teacher.checkpoint=runs/half")


@mistake("a checkpoint of another network")
def _(place: Place) -> list[str]:
    return place.distill("teacher=resnet20")


@mistake("a checkpoint of another width")
def _(place: Place) -> list[str]:
    return place.distill("teacher.width=16")


@mistake("weights of another network")
def _(place: Place) -> list[str]:
    return place.distill(f"teacher.checkpoint={save_mlp(place, DIGITS)}")


@mistake("weights of another number of classes")
def _(place: Place) -> list[str]:
    path = save_mlp(place, InputSpec("image", (1, 8, 8), ("a", "b", "c")))
    return place.distill("teacher=mlp", "teacher.hidden=[8]", f"teacher.checkpoint={path}")


@mistake("a run of another number of classes")
def _(place: Place) -> list[str]:
    folder = shutil.copytree(place.teacher / "model", place.folder / "model")
    card = json.loads((folder / "model.json").read_text())
    card["input"]["class_names"] = ["cat", "dog"]
    (folder / "model.json").write_text(json.dumps(card))
    return place.distill("teacher.checkpoint=model")


@mistake("a checkpoint that is cut short")
def _(place: Place) -> list[str]:
    path = save_mlp(place, DIGITS)
    path.write_bytes(path.read_bytes()[:-200])
    return place.distill(f"teacher.checkpoint={path}")


@mistake("a `.safetensors` file that is cut short")
def _(place: Place) -> list[str]:
    path = place.folder / "weights.safetensors"
    path.write_bytes((place.teacher / WEIGHTS).read_bytes()[:-200])
    return place.distill(f"teacher.checkpoint={path}")


@mistake("a checkpoint that would run code")
def _(place: Place) -> list[str]:
    done = place.folder / "done"
    path = place.folder / "weights.pt"
    torch.save({"layer": _Bomb(done)}, path)

    def check() -> None:
        assert not done.exists()

    place.checks.append(check)
    return place.distill(f"teacher.checkpoint={path}")


class _Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self._path),)


@mistake("weights that were changed afterwards")
def _(place: Place) -> list[str]:
    folder = shutil.copytree(place.teacher / "model", place.folder / "model")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    return place.distill("teacher.checkpoint=model")


# --- networks -----------------------------------------------------------------------------------------------------


@mistake("a network that torchvision does not have")
def _(place: Place) -> list[str]:
    return place.distill("student=torchvision", "student.arch=resnet81")


@mistake("a network for other images")
def _(place: Place) -> list[str]:
    return place.distill("student=torchvision", "student.arch=resnet18")


@mistake("normalisation for other images")
def _(place: Place) -> list[str]:
    return place.distill("student.mean=[0.5,0.5,0.5]")


@mistake("a module of one's own that is not there")
def _(place: Place) -> list[str]:
    return place.distill("student=custom", "student.factory=no_such_module:build")


@mistake("a function of one's own that is not there")
def _(place: Place) -> list[str]:
    return own_teacher(place, "def make(spec): ...\n")


@mistake("a function of one's own that raises")
def _(place: Place) -> list[str]:
    return own_teacher(place, "def build(spec, width):\n    return widht\n", "teacher.kwargs={width: 3}")


@mistake("a network of one's own with other outputs")
def _(place: Place) -> list[str]:
    code = "from torch import nn\n\ndef build(spec): return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))\n"
    return own_teacher(place, code)


@mistake("a network of one's own that needs more than its modules")
def _(place: Place) -> list[str]:
    module, plugin = f"networks_{place.folder.name}", f"plugin_{place.folder.name}"
    code = f"import importlib\n\nfrom torch import nn\n\nimportlib.import_module('plugin_' + '{place.folder.name}')\n"
    code += "def build(spec): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    (place.folder / f"{module}.py").write_text(code)
    (place.folder / f"{plugin}.py").touch()
    return place.train("teacher=custom", f"teacher.factory={module}:build")


@mistake("a module of one's own that was changed since the run began")
def _(place: Place) -> list[str]:
    module = place.folder / f"networks_{place.folder.name}.py"
    module.write_text(
        "from torch import nn\n\ndef build(spec): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    own = ["teacher=custom", f"teacher.factory={module.stem}:build", "cluster=inprocess"]
    request = Request("train-teacher", tuple(place.train(*own, "run.dir=runs/old")[1:]))
    config = load_config(request, ("loss=cross_entropy",)).config
    facts = {"data": config.data.open().fingerprint, "teacher": None}
    kept = partial(collect_own_code, [config], request.command)
    with open_run(request.command, config, provenance=lambda: facts, code=kept) as run:
        run.set_status("killed")
    module.write_text(module.read_text() + "# and more\n")
    return ["train-teacher", "resume=runs/old"]


@mistake("a teacher whose logits are NaN")
def _(place: Place) -> list[str]:
    weights = {"1.weight": torch.full((10, 64), torch.nan), "1.bias": torch.zeros(10)}
    torch.save(weights, place.folder / "nan.pt")
    code = "from torch import nn\n\ndef build(spec): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    return own_teacher(place, code, "teacher.checkpoint=nan.pt", "cluster=inprocess")


@mistake("a learning rate that is far too high")
def _(place: Place) -> list[str]:
    return place.distill("train.optimizer.lr=1e30", "cluster=inprocess")
