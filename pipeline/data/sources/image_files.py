"""Finding the image files of each split below a folder, and their classes."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.contracts.columns import NO_LABEL, SPLITS, SplitName
from pipeline.data.pixels.decode import SourceFile
from pipeline.data.storage import check_exists, open_storage, read_storage, show_path
from pipeline.errors import DataError

# Endings of names for each of ``decode.IMAGE_FORMATS``.
EXTENSIONS: dict[str, tuple[str, ...]] = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
}
ENDINGS = tuple(ending for endings in EXTENSIONS.values() for ending in endings)
# Names of the folders that hold a split, in any case.
FOLDERS: dict[SplitName, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val"),
    "test": ("test",),
}


class ImagePaths(Sequence[SourceFile]):
    """Image files in the order of sample ids; each is one row.

    An Arrow array and not a million objects: it travels to every task that decodes, and is read there where it lies.

    Args:
        shown_root: where the paths begin, for messages.
        paths: relative to it.
    """

    def __init__(self, shown_root: str, paths: pa.Array) -> None:
        self.shown_root = shown_root
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> SourceFile: ...
    @overload
    def __getitem__(self, index: slice) -> list[SourceFile]: ...
    def __getitem__(self, index: int | slice) -> SourceFile | list[SourceFile]:
        rows = range(len(self))[index]
        if isinstance(rows, range):
            return [self[row] for row in rows]
        return SourceFile(f"{self.shown_root}/{self.paths[rows].as_py()}", rows, is_row=True)


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """The image files of a split.

    Attributes:
        root: where their paths begin, within the file system.
        names: their paths.
        sizes: (N,) int64 bytes of each.
        labels: (N,) int64 class numbers, or NO_LABEL.
    """

    root: str
    names: ImagePaths
    sizes: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)


@dataclass
class Folder:
    """A folder of class folders, as it was found.

    Attributes:
        name: relative to ``data.path``; empty where it is that itself.
        images: path relative to ``data.path`` and size of each image.
        class_folders: number of images of each class folder; 0 for one that holds none.
        num_others: files that are no images.
    """

    name: str
    images: list[tuple[str, int]] = field(default_factory=list)
    class_folders: Counter[str] = field(default_factory=Counter)
    num_others: int = 0

    def class_of(self, path: str) -> str | None:
        """Name of the class folder that an image lies in, however deep; none where it lies in none."""
        below = path[len(self.name) + 1 :] if self.name else path
        first, slash, _ = below.partition("/")
        return first if slash else None


@dataclass(frozen=True)
class FoundImages:
    """What lies below ``data.path``.

    Attributes:
        filesystem: it is on.
        root: the path within it.
        shown: the path for messages.
        splits: the folder of each split that has one; train always has.
        class_names: in the order of the class numbers.
    """

    filesystem: pafs.FileSystem
    root: str
    shown: str
    splits: dict[SplitName, Folder]
    class_names: tuple[str, ...]

    def files(self, split: SplitName) -> ImageFiles:
        """The files of a split, in order of path."""
        folder = self.splits[split]
        numbers: dict[str | None, int] = {name: number for number, name in enumerate(self.class_names)}
        labels = [numbers.get(folder.class_of(path), NO_LABEL) for path, _ in folder.images]
        return _make_files(self.root, self.shown, folder.images, labels)


def find_images(path: str) -> FoundImages:
    """Finds the splits below a folder: ``train``, ``validation`` (or ``valid``, ``val``) and ``test``, or train alone.

    Each holds class folders; images that lie in none are rows without label. Without a folder ``train`` the class
    folders of train are expected directly below ``path``. Names that begin with a dot are passed over.

    Args:
        path: ``data.path``; local, or a URI (``s3://...``).

    Raises:
        DataError: something is missing, empty, or in a place where it means nothing.
    """
    filesystem, root, entries = _list(path)
    shown = show_path(path)
    splits = _find_splits(entries, path)
    for folder in splits.values():
        _fill(folder, entries)
        _check_folder(folder, shown)
    return FoundImages(filesystem, root, shown, splits, _name_classes(splits, shown))


def find_all_images(path: str) -> tuple[pafs.FileSystem, ImageFiles]:
    """Every image below a folder, in order of path and without labels.

    Raises:
        DataError: nothing at ``path``, or no image below it.
    """
    filesystem, root, entries = _list(path)
    shown = show_path(path)
    folder = Folder("")
    _fill(folder, entries)
    if not folder.images:
        raise DataError(f"{shown} holds no image{_describe_others(folder)}; expected names ending in {_endings()}.")
    return filesystem, _make_files(root, shown, folder.images, [NO_LABEL] * len(folder.images))


def _list(path: str) -> tuple[pafs.FileSystem, str, list[tuple[str, int | None]]]:
    """Relative path and size of everything below ``path``, sorted; folders have no size."""
    filesystem, root = open_storage(path)
    info = check_exists(filesystem, root, path, "a folder of images")
    if info.type == pafs.FileType.File:
        raise DataError(f"data.path={path} is a file, expected a folder of images; give the folder.")
    selector = pafs.FileSelector(root, recursive=True)
    infos = read_storage(filesystem, root, lambda: filesystem.get_file_info(selector), f"data.path={path}")
    start = len(root.rstrip("/")) + 1
    entries = [(info.path[start:], info.size if info.type == pafs.FileType.File else None) for info in infos]
    return filesystem, root, sorted(entry for entry in entries if not _is_hidden(entry[0]))


def _is_hidden(path: str) -> bool:
    return path.startswith(".") or "/." in path


def _find_splits(entries: Iterable[tuple[str, int | None]], path: str) -> dict[SplitName, Folder]:
    top = {entry.partition("/")[0] for entry, size in entries if size is None or "/" in entry}
    splits: dict[SplitName, Folder] = {}
    for split in SPLITS:
        names = sorted(name for name in top if name.lower() in FOLDERS[split])
        if len(names) > 1:
            raise DataError(
                f"data.path={path} holds {' and '.join(names)}, which all mean the {split} split; keep one of them."
            )
        if names:
            splits[split] = Folder(names[0])
    if splits and "train" not in splits:
        (first, *_) = splits.values()
        raise DataError(
            f"data.path={path} holds the split {first.name!r} but no folder train; expected train/<class>/<image>, "
            "or class folders and no splits."
        )
    return splits or {"train": Folder("")}


def _fill(folder: Folder, entries: Iterable[tuple[str, int | None]]) -> None:
    prefix = f"{folder.name}/" if folder.name else ""
    for path, size in entries:
        if not path.startswith(prefix) or path == prefix:
            continue
        if size is None:
            folder.class_folders[path[len(prefix) :].partition("/")[0]] += 0
        elif path.lower().endswith(ENDINGS):
            folder.images.append((path, size))
            name = folder.class_of(path)
            if name is not None:
                folder.class_folders[name] += 1
        else:
            folder.num_others += 1


def _check_folder(folder: Folder, shown: str) -> None:
    where = f"{shown}/{folder.name}".rstrip("/")
    if not folder.images:
        raise DataError(
            f"{where} holds no image{_describe_others(folder)}; expected <class>/<image> below it, names ending in "
            f"{_endings()}."
        )
    empty = sorted(name for name, num_images in folder.class_folders.items() if num_images == 0)
    if empty:
        raise DataError(
            f"{where}/{empty[0]} is a class folder without an image; expected names ending in {_endings()}: "
            "fill or remove it."
        )


def _name_classes(splits: dict[SplitName, Folder], shown: str) -> tuple[str, ...]:
    """Sorted class folders of train, or of validation where train has none."""
    owner: SplitName = "train" if splits["train"].class_folders or "validation" not in splits else "validation"
    names = tuple(sorted(splits[owner].class_folders))
    if len(names) < 2:
        raise DataError(
            f"{shown}/{splits[owner].name}".rstrip("/") + f" has {len(names)} class folders, expected two or more; "
            "put the images of each class into a folder named after it."
        )
    for split, folder in splits.items():
        for name in sorted(folder.class_folders.keys() - set(names)):
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise DataError(
                f"{shown}/{folder.name}/{name} is no class of {owner}, which has {_shorten(names)}; rename or remove "
                f"the {split} folder{hint}"
            )
    return names


def _make_files(root: str, shown: str, images: Sequence[tuple[str, int]], labels: Sequence[int]) -> ImageFiles:
    names = ImagePaths(shown, pa.array([path for path, _ in images], pa.large_string()))
    return ImageFiles(root, names, np.array([size for _, size in images], np.int64), np.array(labels, np.int64))


def _describe_others(folder: Folder) -> str:
    return f" among its {folder.num_others} files" if folder.num_others else ""


def _endings() -> str:
    return f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
