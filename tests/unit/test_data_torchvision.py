"""Data sets of torchvision, from files written here in the form that torchvision expects."""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from pipeline.contracts.columns import ENCODED, LABEL, SPLITS, InputSpec
from pipeline.data import DataSource
from pipeline.data.sources.torchvision_sets import TorchvisionParams
from pipeline.errors import DataError

RGB = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
GREY = RGB[:, :28, :28, 0]


def open_set(root: Path, dataset: str, **params: Any) -> DataSource:
    return TorchvisionParams(dataset=dataset, root=str(root), download=False, **params).open()


def read_all(source: DataSource, split: Any) -> tuple[np.ndarray, list[int]]:
    table = source.split(split).read(source.split(split).sample_ids)
    return source.decoder(split).decode(table), table[LABEL].to_pylist()


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10 of 5 batches of 4 rows, and 10 test rows."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5: Path(path).exists())
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rows = {f"data_batch_{number + 1}": slice(4 * number, 4 * number + 4) for number in range(5)}
    for name, part in (rows | {"test_batch": slice(20, 30)}).items():
        pixels = RGB[part].transpose(0, 3, 1, 2).reshape(len(RGB[part]), -1)
        labels = (np.arange(30) % 10)[part].tolist()
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    names = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return tmp_path


def write_idx(path: Path, values: np.ndarray) -> None:
    """The format of MNIST: a magic number of type (8: uint8) and dimensions, their sizes, the values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">I{values.ndim}I", 0x0800 + values.ndim, *values.shape) + values.tobytes())


def write_images(folder: Path, ending: str, sizes: list[tuple[int, int]]) -> list[Path]:
    folder.mkdir(parents=True)
    paths = []
    for number, (height, width) in enumerate(sizes):
        paths.append(folder / f"{number}.{ending}")
        Image.fromarray(RGB[number, :height, :width]).save(paths[-1])
    return paths


def test_splits_by_train_true_and_false(cifar: Path) -> None:
    source = open_set(cifar, "CIFAR10", validation_fraction=0.25)
    assert source.spec.shape == (3, 32, 32)
    assert source.spec.class_names[:2] == ("plane", "car")
    assert source.carved == {"validation": "5 rows carved from train by seed 0"}
    assert [source.split(split).num_rows for split in SPLITS] == [15, 5, 10]
    pixels, labels = read_all(source, "test")
    np.testing.assert_array_equal(pixels.transpose(0, 2, 3, 1), RGB[20:])
    assert labels == list(range(10))
    for split in ("train", "validation"):
        ids = source.split(split).sample_ids
        pixels, labels = read_all(source, split)
        np.testing.assert_array_equal(pixels.transpose(0, 2, 3, 1), RGB[ids])
        assert labels == (ids % 10).tolist()


def test_opening_again_gives_the_same_fingerprint(cifar: Path) -> None:
    source = open_set(cifar, "CIFAR10")
    assert open_set(cifar, "CIFAR10", split_seed=1).fingerprint == source.fingerprint
    assert open_set(cifar, "CIFAR10", image_size=(16, 16)).fingerprint != source.fingerprint
    file = cifar / "cifar-10-batches-py" / "test_batch"
    entry = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps(entry | {"labels": [0] * 10}))
    assert open_set(cifar, "CIFAR10").fingerprint == source.fingerprint
    file.write_bytes(pickle.dumps(entry | {"data": 255 - entry["data"]}))
    assert open_set(cifar, "CIFAR10").fingerprint != source.fingerprint


def test_an_opened_set_is_read_without_torch(cifar: Path, tmp_path: Path) -> None:
    source = open_set(cifar, "CIFAR10")
    (tmp_path / "source.pickle").write_bytes(pickle.dumps(source))
    code = (
        "import pickle, sys; source = pickle.load(open(sys.argv[1], 'rb')); reader = source.split('test');"
        "print(source.decoder('test').decode(reader.read(reader.sample_ids)).sum(),"
        " [name for name in ('torch', 'torchvision') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "source.pickle")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{RGB[20:].sum()} []"


def test_grey_images(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    for name, part in (("train", slice(0, 20)), ("t10k", slice(20, 30))):
        write_idx(raw / f"{name}-images-idx3-ubyte", GREY[part])
        write_idx(raw / f"{name}-labels-idx1-ubyte", (np.arange(30) % 10).astype(np.uint8)[part])
    source = open_set(tmp_path, "FashionMNIST")
    assert source.spec.shape == (1, 28, 28)
    assert source.spec.class_names[0] == "T-shirt/top"
    np.testing.assert_array_equal(read_all(source, "test")[0][:, 0], GREY[20:])
    resized = open_set(tmp_path, "FashionMNIST", image_size=(14, 14))
    assert read_all(resized, "test")[0].shape == (10, 1, 14, 14)


def test_splits_by_name_and_files_as_they_are(tmp_path: Path) -> None:
    """Country211 calls its splits train, valid and test, and lets us read its files."""
    written = {}
    for split in ("train", "valid", "test"):
        for country in ("AD", "BE"):
            written[split, country] = write_images(
                tmp_path / "country211" / split / country, "jpg", [(20, 30), (32, 32)]
            )
    source = open_set(tmp_path, "Country211", image_size=(16, 16))
    assert source.spec == InputSpec("image", (3, 16, 16), ("AD", "BE"))
    assert source.carved == {}
    table = source.load("validation").table
    files = written["valid", "AD"] + written["valid", "BE"]
    assert table[ENCODED].to_pylist() == [file.read_bytes() for file in files]
    assert table[LABEL].to_pylist() == [0, 0, 1, 1]
    assert read_all(source, "validation")[0].shape == (4, 3, 16, 16)
    with pytest.raises(DataError, match=r"sample 1 is an image of height 32 and width 32, expected 20 and 30"):
        read_all(open_set(tmp_path, "Country211"), "test")


def test_images_of_many_sizes_lose_nothing(tmp_path: Path) -> None:
    """GTSRB opens its files itself, so they come as pixels."""
    folder = tmp_path / "gtsrb" / "GTSRB"
    for number in range(2):
        write_images(folder / "Training" / f"0000{number}", "ppm", [(8, 9), (10, 11), (8, 9)])
    write_images(folder / "Final_Test" / "Images", "ppm", [(8, 9), (8, 9)])
    (tmp_path / "gtsrb" / "GT-final_test.csv").write_text("Filename;ClassId\n0.ppm;1\n1.ppm;0\n")
    source = open_set(tmp_path, "GTSRB", validation_fraction=0.2)
    rows = {split: source.load(split) for split in SPLITS}
    for split, (_, height, width) in (("test", source.spec.shape),):
        pixels, labels = read_all(source, split)
        np.testing.assert_array_equal(pixels.transpose(0, 2, 3, 1), RGB[:2, :height, :width])
        assert labels == [1, 0]
    for split in ("train", "validation"):
        for sample_id, content in zip(rows[split].sample_ids, rows[split].table[ENCODED].to_pylist(), strict=True):
            number = sample_id % 3
            height, width = (10, 11) if number == 1 else (8, 9)
            with Image.open(__import__("io").BytesIO(content)) as image:
                np.testing.assert_array_equal(np.asarray(image), RGB[number, :height, :width])


def test_a_set_without_splits_is_carved(tmp_path: Path) -> None:
    for name in ("Forest", "River"):
        write_images(tmp_path / "eurosat" / "2750" / name, "jpg", [(16, 16)] * 10)
    source = open_set(tmp_path, "EuroSAT")
    assert source.spec.class_names == ("Forest", "River")
    assert [source.split(split).num_rows for split in SPLITS] == [14, 2, 4]


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"dataset": "cifar100"}, r"torchvision has no data set 'cifar100' .* did you mean 'CIFAR100'\?"),
        ({"dataset": "FashonMNIST"}, r"did you mean 'FashionMNIST'\?"),
        ({"dataset": "ImageFolder"}, r"torchvision has no data set 'ImageFolder'"),
        ({"dataset": "Kinetics"}, r"data\.dataset=Kinetics needs the argument 'frames_per_clip'; give data\.options="),
        (
            {"dataset": "EMNIST"},
            r"data\.dataset=EMNIST needs the argument 'split'; give data\.options=\{split: \.\.\.\}",
        ),
        ({"dataset": "CIFAR10", "options": {"colour": True}}, r"data\.options: .*CIFAR10 has no argument 'colour'"),
        (
            {"dataset": "CIFAR10"},
            r"CIFAR10 cannot be read from .* \(Dataset not found or corrupted.*\); copy there what "
            r"torchvision\.datasets\.CIFAR10\('.*', download=True\) puts there, or set data\.download=true",
        ),
        ({"dataset": "FER2013"}, r"FER2013 cannot be read from .*; torchvision cannot download it"),
        (
            {"dataset": "EMNIST", "options": {"split": "numbers"}},
            r"EMNIST cannot be read .*Unknown value 'numbers' for argument split",
        ),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        open_set(tmp_path, **params)
    assert "\n" not in caught.value.message


def test_a_download_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", fail)
    with pytest.raises(
        DataError, match=r"could not be downloaded to .* \(<urlopen error .*\); without a network, copy there what .*"
        r"torchvision\.datasets\.CIFAR100\(.*, and set data\.download=false"
    ):  # fmt: skip
        TorchvisionParams(dataset="CIFAR100", root=str(tmp_path)).open()


def test_sets_that_are_none_for_classification(tmp_path: Path) -> None:
    (tmp_path / "MovingMNIST").mkdir()
    np.save(tmp_path / "MovingMNIST" / "mnist_test_seq.npy", np.zeros((20, 2, 4, 4), np.uint8))
    with pytest.raises(DataError, match=r"MovingMNIST is none for classification: its row 0 is no pair"):
        open_set(tmp_path, "MovingMNIST")


def test_a_set_too_large_for_memory(cifar: Path) -> None:
    with pytest.raises(DataError, match=r"CIFAR10 has more than data\.memory_bytes=6144 of images; raise it"):
        open_set(cifar, "CIFAR10", memory_bytes=2 * 32 * 32 * 3)
