"""Opening the data sets of torchvision. The only module here that imports it, and only in a function."""

from __future__ import annotations

import difflib
import inspect
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipeline.contracts.columns import SplitName
from pipeline.errors import DataError

# What a class that has ``split`` may call each of ours.
SPLIT_NAMES: dict[SplitName, tuple[str, ...]] = {
    "train": ("train", "trainval", "train-standard"),
    "validation": ("val", "valid", "validation"),
    "test": ("test",),
}
# Classes that hold no data set of their own.
_GENERIC = ("DatasetFolder", "FakeData", "ImageFolder", "LSUN", "LSUNClass", "VisionDataset")
# A server that does not answer is given up after this long.
_TIMEOUT_S = 30.0


def load_sets(
    name: str, root: str, download: bool, options: Mapping[str, str | int | float | bool]
) -> dict[SplitName, Any]:
    """The data set of each split that torchvision has; train always has one.

    Args:
        name: of a class of ``torchvision.datasets``. Its constructor says whether it has ``train`` or ``split``.
        root: folder of its files.
        download: whether files that are not there are downloaded.
        options: further arguments of the class.

    Raises:
        DataError: no such class, arguments it does not have, or its files are not there.
    """
    from torchvision import datasets  # and torch with it: half a gigabyte, in the process that opens the data set

    kind = _find_class(datasets, name)
    accepted = _parameters_of(kind)
    given: dict[str, Any] = {"root": os.path.abspath(os.path.expanduser(root)), **options}
    if "download" in accepted:
        given["download"] = download
    if "loader" in accepted:
        given["loader"] = _read_file  # the files as they are: smaller than their pixels, and nothing is lost
    _check_arguments(name, accepted, given)
    if "train" in accepted and "train" not in given:
        return {"train": _make(kind, given | {"train": True}), "test": _make(kind, given | {"train": False})}
    if "split" not in accepted or "split" in given:
        return {"train": _make(kind, given)}
    found: dict[SplitName, Any] = {}
    for split, candidates in SPLIT_NAMES.items():
        made = (_make(kind, given | {"split": candidate}, may_lack_split=True) for candidate in candidates)
        dataset = next((dataset for dataset in made if dataset is not None), None)
        if dataset is not None:
            found[split] = dataset
    if "train" not in found:
        raise DataError(f"data.dataset={name} has no split for training; choose another data set.")
    return found


def _find_class(datasets: Any, name: str) -> type:
    classes = {known: getattr(datasets, known) for known in datasets.__all__ if known not in _GENERIC}
    known = [
        name for name, kind in classes.items() if inspect.isclass(kind) and issubclass(kind, datasets.VisionDataset)
    ]
    if name not in known:
        near = difflib.get_close_matches(name.lower(), [known.lower() for known in known], n=1)
        hint = next((f"; did you mean {known!r}?" for known in known if [known.lower()] == near), ".")
        raise DataError(
            f"torchvision has no data set {name!r} (data.dataset); expected a class of torchvision.datasets, such as "
            f"CIFAR100{hint}"
        )
    found: type = classes[name]
    return found


def _parameters_of(kind: type) -> dict[str, inspect.Parameter]:
    """What a class is made from; what it passes on to its parents included."""
    found: dict[str, inspect.Parameter] = {}
    for parent in kind.__mro__:
        parameters = list(inspect.signature(parent.__init__).parameters.values())[1:]  # type: ignore[misc]
        for parameter in parameters:
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                found.setdefault(parameter.name, parameter)
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def _check_arguments(name: str, accepted: Mapping[str, inspect.Parameter], given: Mapping[str, Any]) -> None:
    for argument in given:
        if argument not in accepted:
            raise DataError(
                f"data.options: torchvision.datasets.{name} has no argument {argument!r}, only {', '.join(accepted)}; "
                "correct it."
            )
    drawn = () if "train" in accepted else ("split",)  # we give it
    for argument, parameter in accepted.items():
        if parameter.default is inspect.Parameter.empty and argument not in (*given, *drawn):
            raise DataError(
                f"data.dataset={name} needs the argument {argument!r}; give data.options={{{argument}: ...}}, or "
                "choose a data set of single images with a class each."
            )


def _make(kind: type, arguments: dict[str, Any], may_lack_split: bool = False) -> Any:
    """The data set; none where it may lack a split of that name, and does."""
    try:
        with _network_timeout():
            return kind(**arguments)
    except Exception as error:  # its own checks, the network, archives, missing packages: torchvision raises anything
        reason = " ".join(str(error).split()) or type(error).__name__
        if may_lack_split and isinstance(error, ValueError) and "argument split" in reason:
            return None
        name, root = kind.__name__, arguments["root"]
        call = f"torchvision.datasets.{name}({root!r}, download=True)"
        if arguments.get("download"):
            raise DataError(
                f"data.dataset={name} could not be downloaded to {root} ({reason}); without a network, copy there what "
                f"{call} puts there elsewhere, and set data.download=false."
            ) from error
        advice = f"copy there what {call} puts there, or set data.download=true."
        if "download" not in arguments:
            advice = "torchvision cannot download it, so put its files there as its documentation says."
        raise DataError(f"data.dataset={name} cannot be read from {root} ({reason}); {advice}") from error


@contextmanager
def _network_timeout() -> Iterator[None]:
    """Torchvision's downloads have no timeout of their own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
