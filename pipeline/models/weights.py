"""Weights on disk: fingerprints, loading without surprises, and the model folder of a run."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.contracts.columns import InputSpec
from pipeline.contracts.own_code import CODE_FOLDER
from pipeline.errors import CheckpointError
from pipeline.models.classifier import Classifier, describe_error, describe_preprocessing, network_spec
from pipeline.models.params import ModelParams

WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "model.json"

StateDict = Mapping[str, Tensor]


def fingerprint_state(state_dict: StateDict) -> str:
    """16 hex digits of a SHA-256 over names, dtypes, shapes and bytes; the order of names does not matter."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def load_weights(network: nn.Module, path: Path | str) -> None:
    """Loads a file of weights into ``network``: all of them or, on an error, none.

    Args:
        network: built already.
        path: a ``.safetensors`` file, or one that ``torch.save`` wrote: a state dict, bare or under
            ``state_dict`` or ``model``, its names with or without a common ``module.``.

    Raises:
        CheckpointError: the file is missing, damaged, holds something else than tensors, or its names or
            shapes are not the network's.
    """
    path = Path(path)
    expected = network.state_dict()
    state_dict = _strip_prefix(_read_state(path), expected)
    _check_names(state_dict, expected, path)
    _check_shapes(state_dict, expected, path)
    network.load_state_dict(state_dict)


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} is not a file: give the path of a file with weights.")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch_file(path)
    if isinstance(content, dict):
        wrapped = (content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict))
        content = next(wrapped, content)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        found = type(content).__name__
        if isinstance(content, dict):
            found = "dict with " + ", ".join(
                str(key) for key, value in content.items() if not isinstance(value, Tensor)
            )
        raise CheckpointError(
            f"checkpoint {path} holds a {found}, expected a state dict of tensors: save it with "
            "torch.save(network.state_dict(), path)."
        )
    return content


def _read_safetensors(path: Path) -> Any:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(path, describe_error(error)) from error


def _read_torch_file(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle's newer protocols, in which torch never writes weights
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(
            error
        ):  # bytes that are no instruction; all else is an object it will not build
            raise _damaged(path, "not written by torch.save") from error
        raise CheckpointError(
            f"checkpoint {path} holds Python objects besides tensors, which could run code when loaded, so it is "
            "refused: save it with torch.save(network.state_dict(), path)."
        ) from error
    except Exception as error:  # a damaged file surfaces as any of a dozen types
        raise _damaged(path, describe_error(error)) from error


def _damaged(path: Path, reason: str) -> CheckpointError:
    size = path.stat().st_size
    return CheckpointError(
        f"checkpoint {path} ({size} bytes) cannot be read, it is truncated or not a file of weights "
        f"({reason}): copy or save it again."
    )


def _strip_prefix(state_dict: dict[str, Tensor], expected: StateDict) -> dict[str, Tensor]:
    """Without the ``module.`` that DataParallel puts before every name, unless the network has it too."""
    prefix = "module."
    if any(name.startswith(prefix) for name in expected) or not all(name.startswith(prefix) for name in state_dict):
        return state_dict
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}


def _check_names(state_dict: StateDict, expected: StateDict, path: Path) -> None:
    problems = []
    for problem, names in (
        ("lacks", [name for name in expected if name not in state_dict]),
        ("has besides", [name for name in state_dict if name not in expected]),
    ):
        if names:
            listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            problems.append(f"{problem} {len(names)} ({listed})")
    if problems:
        raise CheckpointError(
            f"checkpoint {path} is of another architecture: of the network's {len(expected)} tensors it "
            f"{' and '.join(problems)}; configure the model that it was saved from."
        )


def _check_shapes(state_dict: StateDict, expected: StateDict, path: Path) -> None:
    wrong = [name for name, tensor in expected.items() if state_dict[name].shape != tensor.shape]
    if wrong:
        listed = ", ".join(
            f"{name} {tuple(state_dict[name].shape)}, expected {tuple(expected[name].shape)}" for name in wrong[:3]
        )
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"checkpoint {path} has {len(wrong)} tensors of another shape: {listed}{more}; "
            "configure the model (its sizes, number of classes and channels) that it was saved from."
        )


@dataclass(frozen=True)
class ModelCard:
    """What the weights of a run folder are.

    Attributes:
        params: the model's ``architecture()``.
        input: ``InputSpec.to_dict()``.
        fingerprint: ``fingerprint_state`` of the weights.
        metrics: by name (``val/top1``).
        data_fingerprint: of the data that the model was trained on.
        mean: per channel or feature; none: the input was not normalised.
        std: like ``mean``.
        image_size: height and width that images are resized to; none: they are not.
    """

    params: dict[str, Any]
    input: dict[str, Any]
    fingerprint: str
    metrics: dict[str, float]
    data_fingerprint: str
    mean: list[float] | None
    std: list[float] | None
    image_size: list[int] | None = None

    @classmethod
    def describe(
        cls, params: ModelParams, classifier: Classifier, metrics: dict[str, float], data_fingerprint: str
    ) -> ModelCard:
        """The card of a classifier built from ``params``, with its weights of now."""
        return cls(
            params=params.architecture(),
            input=classifier.spec.to_dict(),
            fingerprint=fingerprint_state(classifier.network.state_dict()),
            metrics=metrics,
            data_fingerprint=data_fingerprint,
            **describe_preprocessing(params, classifier.spec),
        )


def save_model(folder: Path, classifier: Classifier, card: ModelCard, code: Path | None = None) -> None:
    """Writes ``model.safetensors`` and ``model.json`` to ``folder``, replacing an earlier one as a whole.

    Args:
        code: folder of the user's modules that the network is built by, copied to ``code/``; none: it needs none.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        fresh = Path(scratch, "new")
        fresh.mkdir()
        # Clones, because safetensors refuses tensors that share memory (tied weights).
        state_dict = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in classifier.network.state_dict().items()
        }
        safetensors.torch.save_file(state_dict, fresh / WEIGHTS_FILE)
        (fresh / CARD_FILE).write_text(json.dumps(asdict(card), indent=2) + "\n", encoding="utf-8")
        if code is not None:
            shutil.copytree(code, fresh / CODE_FOLDER, ignore=shutil.ignore_patterns("__pycache__"))
        if folder.exists():  # a folder cannot be renamed onto one that is not empty
            folder.rename(Path(scratch, "old"))
        fresh.rename(folder)


def read_card(folder: Path) -> ModelCard:
    """The card in ``folder``.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = folder / CARD_FILE
    try:
        return ModelCard(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"model card {path} cannot be read ({describe_error(error)}): use a folder that a finished run wrote."
        ) from error


def resolve_checkpoint(path: str) -> Path:
    """The weights file that ``path`` means: itself, or the one of a model folder or a run folder.

    Raises:
        CheckpointError: there is none.
    """
    given = Path(path)
    candidates = (given, given / WEIGHTS_FILE, given / "model" / WEIGHTS_FILE)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if (given / "config.yaml").is_file():
        raise CheckpointError(
            f"run {given} has not finished, so it has no model yet: go on with it with resume={given}."
        )
    if given.is_dir():
        raise CheckpointError(
            f"folder {given} has neither {WEIGHTS_FILE} nor model/{WEIGHTS_FILE}: "
            "give the folder of a finished run, or a file with weights."
        )
    raise CheckpointError(
        f"checkpoint {given} does not exist: give a file with weights or the folder of a finished run."
    )


def load_initial_weights(classifier: Classifier, params: ModelParams, *, role: str) -> str:
    """Loads what training starts from: the checkpoint, else published weights; else the fresh weights stay.

    Args:
        classifier: built from ``params``.
        params: of the model.
        role: see ``load_checkpoint``.

    Returns:
        which of them, for people.

    Raises:
        CheckpointError: they cannot be downloaded or read, or are of another model.
    """
    if params.checkpoint is not None:
        load_checkpoint(classifier, params, role=role)
        return params.checkpoint
    published = params.load_published(classifier.network, network_spec(params, classifier.spec))
    return "fresh weights" if published is None else str(published)


def load_teacher_weights(classifier: Classifier, params: ModelParams) -> str:
    """Like ``load_initial_weights`` for a teacher, which must be trained already.

    Raises:
        CheckpointError: besides, there are none, or the published ones are of another number of classes.
    """
    if params.checkpoint is not None or not params.has_weights:
        load_checkpoint(classifier, params, role="teacher")
        return str(params.checkpoint)
    published = params.load_published(classifier.network, network_spec(params, classifier.spec))
    if published is None or not published.whole:
        raise CheckpointError(
            f"teacher {params.name!r} with {published} cannot teach {classifier.spec.num_classes} classes before it "
            "has learned them: train it with `train-teacher` and give its run folder as teacher.checkpoint=PATH."
        )
    return str(published)


def load_checkpoint(classifier: Classifier, params: ModelParams, *, role: str) -> None:
    """Loads ``params.checkpoint``; where it has a model card, first compares that with the classifier.

    Args:
        classifier: built from ``params``.
        params: of the model.
        role: ``"teacher"`` or ``"student"``: where the parameters stand in the configuration.

    Raises:
        CheckpointError: the checkpoint is not set, missing, damaged, or of another model.
    """
    if params.checkpoint is None:
        remedy = (
            "train one with `train-teacher` and give its run folder" if role == "teacher" else "give its run folder"
        )
        raise CheckpointError(
            f"{role}.checkpoint is not set: {remedy}, or a file with weights, as {role}.checkpoint=PATH."
        )
    path = resolve_checkpoint(params.checkpoint)
    card = read_card(path.parent) if (path.parent / CARD_FILE).is_file() else None
    if card:
        _check_card(card, params, classifier.spec, path, role)
    load_weights(classifier.network, path)
    if card and card.fingerprint != (found := fingerprint_state(classifier.network.state_dict())):
        raise CheckpointError(
            f"checkpoint {path} has fingerprint {found} but its card says {card.fingerprint}: "
            "the file was changed after it was written; use the folder as the run wrote it."
        )


def _check_card(card: ModelCard, params: ModelParams, spec: InputSpec, path: Path, role: str) -> None:
    given = params.architecture() | describe_preprocessing(params, spec)
    if card.params.get("name") != given["name"]:
        raise CheckpointError(
            f"checkpoint {path} is of model {card.params.get('name')!r} but the {role} is {given['name']!r}: "
            f"give {role}={card.params.get('name')}, or another {role}.checkpoint."
        )
    trained = card.params | {"mean": card.mean, "std": card.std}
    if card.image_size is not None:  # without one it had the size of its data, which other data may be resized to
        trained["image_size"] = card.image_size
        given["image_size"] = list(network_spec(params, spec).shape[1:])
    for field, value in trained.items():
        if given.get(field) != value:
            override = json.dumps(value, separators=(",", ":"))
            raise CheckpointError(
                f"checkpoint {path} was trained with {field}={override} but the {role} has {field}="
                f"{json.dumps(given.get(field), separators=(',', ':'))}: give {role}.{field}={override}, "
                f"or another {role}.checkpoint."
            )
    classes = tuple(card.input["class_names"])
    if len(classes) != spec.num_classes:
        raise CheckpointError(
            f"checkpoint {path} tells {len(classes)} classes apart but the data has {spec.num_classes}: "
            f"give the data that it was trained on, or another {role}.checkpoint."
        )
    if classes != spec.class_names and set(classes) == set(spec.class_names):
        raise CheckpointError(
            f"checkpoint {path} numbers the classes in another order ({', '.join(classes[:3])}, ...) than the data "
            f"({', '.join(spec.class_names[:3])}, ...): bring the data's class names into the order of the checkpoint."
        )
