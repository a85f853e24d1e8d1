"""Folders of images: layouts, labels, reading, and the sentences for what can be wrong with them."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.contracts.columns import ENCODED, LABEL, NO_LABEL, SAMPLE_ID, SPLITS, InputSpec
from pipeline.data import AugmentParams, DataSource, EpochOrder
from pipeline.data.pixels.decode import IMAGE_FORMATS
from pipeline.data.sources.image_files import EXTENSIONS
from pipeline.data.sources.image_folder import ImageFolderParams
from pipeline.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 6, 5, 3), dtype=np.uint8)


def save(path: Path, number: int = 0, size: tuple[int, int] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = PIXELS[number] if size is None else np.zeros((*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def write_class_folders(folder: Path, num_images: int = 24) -> Path:
    """``cat``, ``dog`` and ``emu``; the names of files are not in the order of classes."""
    for number in range(num_images):
        save(folder / ("emu", "cat", "dog")[number % 3] / f"{number:02}.png", number)
    return folder


def write_splits(folder: Path) -> Path:
    for number in range(12):
        save(folder / "train" / ("cat", "dog", "emu")[number % 3] / f"{number}.png", number)
    for number in range(12, 18):
        save(folder / "val" / ("cat", "dog", "emu")[number % 3] / "deep" / f"{number}.png", number)
    for number in range(18, 24):
        save(folder / "Test" / ("cat", "emu")[number % 2] / f"{number}.PNG", number)
    return folder


def open_folder(path: Path, **params: Any) -> DataSource:
    return ImageFolderParams(path=str(path), **params).open()


def test_splits_come_from_their_folders(tmp_path: Path) -> None:
    source = open_folder(write_splits(tmp_path))
    assert source.spec == InputSpec("image", (3, 6, 5), ("cat", "dog", "emu"))
    assert source.carved == {}
    assert source.unlabelled == {}
    expected = {
        "train": [0, 3, 6, 9, 1, 10, 4, 7, 11, 2, 5, 8],  # sorted by path: cat/0, cat/3, ..., dog/1, dog/10, ...
        "validation": [12, 15, 13, 16, 14, 17],
        "test": [18, 20, 22, 19, 21, 23],
    }
    labels = {"train": [0] * 4 + [1] * 4 + [2] * 4, "validation": [0, 0, 1, 1, 2, 2], "test": [0] * 3 + [2] * 3}
    for split in SPLITS:
        reader = source.split(split)
        table = reader.read(reader.sample_ids)
        assert table[SAMPLE_ID].to_pylist() == list(range(reader.num_rows))
        assert table[LABEL].to_pylist() == labels[split]
        np.testing.assert_array_equal(
            source.decoder(split).decode(table).transpose(0, 2, 3, 1), PIXELS[expected[split]]
        )


def test_class_folders_alone_are_carved(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    source = open_folder(tmp_path)
    assert source.spec.class_names == ("cat", "dog", "emu")
    assert {split: source.split(split).num_rows for split in SPLITS} == {"train": 17, "validation": 2, "test": 5}
    assert source.carved["test"] == "5 rows carved from train by seed 0"
    ids = np.concatenate([source.split(split).sample_ids for split in SPLITS])
    np.testing.assert_array_equal(np.sort(ids), np.arange(24))
    table = source.split("train").read(source.split("train").sample_ids)
    np.testing.assert_array_equal(table[LABEL].to_numpy(), table[SAMPLE_ID].to_numpy() // 8)


def test_rows_come_in_the_order_asked_and_are_the_files(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    source = open_folder(tmp_path)
    reader = source.split("train")
    ids = reader.sample_ids[[5, 0, 16, 5]]
    files = sorted(path for path in tmp_path.rglob("*.png"))
    table = reader.read(ids)
    assert table[ENCODED].to_pylist() == [files[sample_id].read_bytes() for sample_id in ids]
    assert reader.encoded_bytes == sum(files[sample_id].stat().st_size for sample_id in reader.sample_ids)
    loaded = source.load("train")
    assert loaded.read(ids).equals(table)
    assert loaded.encoded_bytes >= reader.encoded_bytes
    with pytest.raises(DataError, match="is not one of the 17 rows"):
        reader.read(source.split("test").sample_ids[:1])


def test_order_does_not_depend_on_memory(tmp_path: Path) -> None:
    """Files are read one by one, so nothing keeps a split that is not in memory from being shuffled as a whole."""
    write_class_folders(tmp_path)
    small, large = open_folder(tmp_path, memory_bytes=0), open_folder(tmp_path)
    assert not small.in_memory("train")
    assert large.in_memory("train")
    orders = [
        EpochOrder(reader, 3, window_bytes=100).ids(1, 0, 17) for reader in (small.split("train"), large.load("train"))
    ]
    np.testing.assert_array_equal(*orders)


def test_every_format_is_found_and_nothing_else(tmp_path: Path) -> None:
    assert set(EXTENSIONS) == set(IMAGE_FORMATS)
    write_class_folders(tmp_path, 12)
    for number, endings in enumerate(EXTENSIONS.values()):
        for ending in endings:
            save(tmp_path / "cat" / f"x{number}{ending.upper()}", number)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    save(tmp_path / "cat" / ".hidden.png")
    save(tmp_path / ".cache" / "x.png")
    source = open_folder(tmp_path)
    found = 12 + sum(map(len, EXTENSIONS.values()))
    assert sum(source.split(split).num_rows for split in SPLITS) == found
    for split in SPLITS:
        decoded = source.decoder(split).decode(source.split(split).read(source.split(split).sample_ids))
        assert decoded.shape[1:] == (3, 6, 5)


def test_images_in_no_class_folder_have_no_label(tmp_path: Path) -> None:
    write_splits(tmp_path)
    save(tmp_path / "train" / "bird.png", 1)
    save(tmp_path / "Test" / "zebra.png", 1)
    source = open_folder(tmp_path)
    table = source.load("train").table
    assert table[LABEL].to_pylist() == [NO_LABEL] + [0] * 4 + [1] * 4 + [2] * 4
    assert {split: rows.num_rows for split, rows in source.unlabelled.items()} == {"train": 1, "test": 1}
    assert source.load("test").table[LABEL].to_pylist() == [0, 0, 0, 2, 2, 2, NO_LABEL]
    assert source.unlabelled["train"].first == f"{tmp_path}/train/bird.png (sample 0)"


def test_train_may_have_no_labels_at_all(tmp_path: Path) -> None:
    write_splits(tmp_path)
    shutil.rmtree(tmp_path / "train")
    for number in range(5):
        save(tmp_path / "train" / f"{number}.png", number)
    source = open_folder(tmp_path)
    assert source.spec.class_names == ("cat", "dog", "emu")
    assert source.unlabelled["train"].num_rows == 5
    assert set(source.unlabelled) == {"train"}
    assert (source.load("train").table[LABEL].to_numpy() == NO_LABEL).all()


def test_images_are_brought_to_one_size(tmp_path: Path) -> None:
    write_class_folders(tmp_path, 9)
    save(tmp_path / "emu" / "99.png", size=(12, 20))
    source = open_folder(tmp_path)
    odd = next(split for split in SPLITS if 9 in source.split(split).sample_ids)
    with pytest.raises(DataError, match=r"emu/99\.png \(sample 9\) is an image of height 12 and width 20"):
        source.decoder(odd).decode(source.split(odd).read(np.array([9])))
    source = open_folder(tmp_path, image_size=(4, 4))
    assert source.spec.shape == (3, 4, 4)
    for split in SPLITS:
        table = source.split(split).read(source.split(split).sample_ids)
        assert source.decoder(split).decode(table).shape == (table.num_rows, 3, 4, 4)


def test_fingerprint_covers_names_order_and_sizes(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "a")
    before = open_folder(tmp_path / "a").fingerprint
    assert open_folder(shutil.copytree(tmp_path / "a", tmp_path / "b"), split_seed=1).fingerprint == before
    assert open_folder(tmp_path / "a", image_size=(3, 3)).fingerprint != before
    (tmp_path / "b" / "cat" / "01.png").rename(tmp_path / "b" / "cat" / "99.png")
    assert open_folder(tmp_path / "b").fingerprint != before
    (tmp_path / "b" / "cat" / "99.png").rename(tmp_path / "b" / "cat" / "01.png")
    assert open_folder(tmp_path / "b").fingerprint == before
    save(tmp_path / "b" / "cat" / "01.png", size=(6, 5))
    assert open_folder(tmp_path / "b").fingerprint != before


def test_readers_and_decoders_pickle(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    source = open_folder(tmp_path)
    reader, decoder = pickle.loads(pickle.dumps((source.split("test"), source.decoder("test"))))
    table = source.split("test").read(source.split("test").sample_ids)
    assert reader.read(reader.sample_ids).equals(table)
    np.testing.assert_array_equal(decoder.decode(table), source.decode(table))
    assert [file.path for file in decoder.files[:2]] == [f"{tmp_path}/cat/01.png", f"{tmp_path}/cat/04.png"]


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    file = tmp_path / "emu" / "21.png"
    file.write_bytes(file.read_bytes()[:80])
    source = open_folder(tmp_path)
    split = next(split for split in SPLITS if 23 in source.split(split).sample_ids)
    with pytest.raises(DataError, match=r"emu/21\.png \(sample 23\) is a damaged image"):
        source.decoder(split).decode(source.split(split).read(np.array([23])))


def test_the_first_image_may_be_bad_where_bad_ones_are_skipped(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    for name in ("01", "04"):
        (tmp_path / "cat" / f"{name}.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"cat/0\d\.png is not an image that can be read"):
        open_folder(tmp_path, split_seed=next(seed for seed in range(9) if _first_is_junk(tmp_path, seed)))
    assert open_folder(tmp_path, on_bad_row="skip").spec.shape == (3, 6, 5)


def _first_is_junk(path: Path, seed: int) -> bool:
    return bool(open_folder(path, split_seed=seed, on_bad_row="skip").split("train").sample_ids[0] < 2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda file: file.unlink(), r"cat/01\.png cannot be read \(.*\); it was removed or damaged"),
        (lambda file: save(file, size=(6, 5)), r"cat/01\.png has \d+ bytes, expected \d+; it has changed"),
    ],
)
def test_files_that_change_during_a_run_are_named(
    tmp_path: Path, change: Callable[[Path], None], sentence: str
) -> None:
    write_class_folders(tmp_path)
    source = open_folder(tmp_path)
    reader = next(source.split(split) for split in SPLITS if 0 in source.split(split).sample_ids)
    change(tmp_path / "cat" / "01.png")
    with pytest.raises(DataError, match=sentence) as caught:
        reader.read(reader.sample_ids)
    assert "\n" not in caught.value.message


def nothing(path: Path) -> dict[str, Any]:
    return {}


def no_folder(path: Path) -> dict[str, Any]:
    return {"path": str(path / "absent")}


def a_file(path: Path) -> dict[str, Any]:
    save(path / "x.png")
    return {"path": str(path / "x.png")}


def no_images(path: Path) -> dict[str, Any]:
    for name in ("a", "b"):
        (path / name).mkdir()
        (path / name / "x.npy").write_bytes(b"")
    return {}


def no_class_folders(path: Path) -> dict[str, Any]:
    save(path / "x.png")
    return {}


def one_class(path: Path) -> dict[str, Any]:
    save(path / "train" / "cat" / "x.png")
    return {}


def empty_class(path: Path) -> dict[str, Any]:
    write_class_folders(path)
    (path / "fox").mkdir()
    (path / "fox" / "x.txt").write_text("")
    return {}


def empty_split(path: Path) -> dict[str, Any]:
    write_splits(path)
    shutil.rmtree(path / "val")
    (path / "val").mkdir()
    return {}


def unknown_class(path: Path) -> dict[str, Any]:
    write_splits(path)
    (path / "val" / "dog").rename(path / "val" / "dogs")
    return {}


def no_train(path: Path) -> dict[str, Any]:
    write_splits(path)
    shutil.rmtree(path / "train")
    return {}


def two_validations(path: Path) -> dict[str, Any]:
    write_splits(path)
    save(path / "valid" / "cat" / "x.png")
    return {}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (no_folder, r"data\.path=.*/absent does not exist; give a folder of images"),
        (a_file, r"data\.path=.*/x\.png is a file, expected a folder of images"),
        (nothing, r" holds no image; expected <class>/<image> below it, names ending in \.png, .* or \.tiff"),
        (no_images, r" holds no image among its 2 files; expected <class>/<image>"),
        (no_class_folders, r" has 0 class folders, expected two or more; put the images of each class"),
        (one_class, r"/train has 1 class folders, expected two or more"),
        (empty_class, r"/fox is a class folder without an image; .* fill or remove it"),
        (empty_split, r"/val holds no image; expected <class>/<image> below it"),
        (unknown_class, r"/val/dogs is no class of train, which has cat, dog, emu; .* did you mean 'dog'\?"),
        (no_train, r"holds the split 'val' but no folder train; expected train/<class>/<image>"),
        (two_validations, r"holds val and valid, which all mean the validation split; keep one"),
    ],
)
def test_what_is_wrong_is_said_when_opening(
    tmp_path: Path, make: Callable[[Path], dict[str, Any]], sentence: str
) -> None:
    params = {"path": str(tmp_path)} | make(tmp_path)
    with pytest.raises(DataError, match=sentence) as caught:
        ImageFolderParams(**params).open()
    assert "\n" not in caught.value.message


def test_augmentation_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    assert open_folder(tmp_path, augment=AugmentParams(flip=True)).spec.kind == "image"
    for path in tmp_path.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert open_folder(tmp_path, augment=AugmentParams(brightness=0.1)).spec.shape == (1, 6, 5)


def test_rows_to_predict_are_all_images_below_the_folder(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "x")
    save(tmp_path / "a.png", 3)
    params = ImageFolderParams(path=str(tmp_path))
    reader, decoder = params.open_rows(InputSpec("image", (3, 6, 5), ("a", "b")))
    table = reader.read(reader.sample_ids)
    assert table.num_rows == 25
    assert set(table[LABEL].to_pylist()) == {NO_LABEL}
    np.testing.assert_array_equal(decoder.decode(table)[0].transpose(1, 2, 0), PIXELS[3])
    assert decoder.files[0].path == f"{tmp_path}/a.png"


def test_rows_of_another_form_are_not_predicted(tmp_path: Path) -> None:
    params = ImageFolderParams(path=str(tmp_path))
    with pytest.raises(DataError, match="holds no image; expected names ending in"):
        params.open_rows(InputSpec("image", (3, 6, 5), ("a", "b")))
    save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png .*set data\.image_size=\[8,8\]"):
        params.open_rows(InputSpec("image", (3, 8, 8), ("a", "b")))
    with pytest.raises(DataError, match="feature"):
        params.open_rows(InputSpec("features", (8,), ("a", "b")))
    with pytest.raises(DataError, match="channels"):
        params.open_rows(InputSpec("image", (1, 6, 5), ("a", "b")))
    sized = ImageFolderParams(path=str(tmp_path), image_size=(8, 8))
    reader, decoder = sized.open_rows(InputSpec("image", (3, 8, 8), ("a", "b")))
    assert decoder.decode(reader.read(reader.sample_ids)).shape == (1, 3, 8, 8)
