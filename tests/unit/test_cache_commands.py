"""Training from a cache that ``cache build`` made, in one process: the same student as online, or a refusal."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.tracking.quiet import import_mlflow
from tests.unit.cached_runs import (
    CACHED,
    EXACT,
    LABELS,
    NUM_ROWS,
    NUM_TRAINED,
    VIEWS,
    Workplace,
    assert_same_student,
    read_view,
    save_teacher,
    write_pictures,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """With a cache of three views in float32, and the student that the teacher itself taught."""
    place = Workplace.make(tmp_path_factory.mktemp("cached"))
    assert place.run("cache build", "build", *VIEWS, EXACT) == 0
    assert place.run("distill", "online", *VIEWS) == 0
    return place


@pytest.fixture
def new_place(place: Workplace, tmp_path: Path) -> Workplace:
    """The same data and teacher, without a cache."""
    shutil.copytree(place.folder / "data", tmp_path / "data")
    shutil.copy(place.folder / "teacher.pt", tmp_path / "teacher.pt")
    shutil.copy(place.folder / "mlflow.db", tmp_path / "mlflow.db")  # making one takes seconds
    return Workplace(tmp_path)


# --- the same student ---------------------------------------------------------------------------------------------


def test_cached_training_is_online_training(place: Workplace) -> None:
    """Over four epochs, so that the first view comes again."""
    assert place.run("distill", "cached", *VIEWS, EXACT, CACHED) == 0
    assert_same_student(place, "cached", "online")
    # It did not all come to the same: other views make another student.
    assert place.run("distill", "plain") == 0
    assert place.result("plain")["metrics"] != place.result("online")["metrics"]


@pytest.mark.parametrize("mixing", [("mixup=0.4",), ("cutmix=1.0",), ("mixup=0.4", "cutmix=1.0", "randaugment=1")])
def test_with_mixed_images(new_place: Workplace, mixing: tuple[str, ...]) -> None:
    augment = [*VIEWS, *(f"data.augment.{text}" for text in mixing)]
    assert new_place.run("distill", "online", *augment) == 0
    assert new_place.run("cache build", "build", *augment, EXACT) == 0
    assert new_place.run("distill", "cached", *augment, EXACT, CACHED) == 0
    assert_same_student(new_place, "cached", "online")


def test_seeds_share_a_cache_where_they_share_the_views(
    new_place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = [*VIEWS, "data.view_seed=7"]
    assert new_place.run("cache build", "build", *shared, EXACT) == 0
    for seed in ("run.seed=1", "run.seed=2"):
        assert new_place.run("distill", f"online-{seed}", *shared, seed) == 0
        assert new_place.run("distill", f"cached-{seed}", *shared, seed, EXACT, CACHED) == 0
        assert_same_student(new_place, f"cached-{seed}", f"online-{seed}")
    assert new_place.result("online-run.seed=1")["metrics"] != new_place.result("online-run.seed=2")["metrics"]
    assert len(list(new_place.caches.iterdir())) == 1
    capsys.readouterr()
    # Without it each has views of its own.
    assert new_place.run("distill", "refused", *VIEWS, "run.seed=1", EXACT, CACHED) == 2
    assert "differs in seed (stored 7, wanted 1)" in capsys.readouterr().err


def test_what_never_varies_needs_one_view(new_place: Workplace) -> None:
    """Without augmentation all views and seeds are the same."""
    assert new_place.run("cache build", "build", EXACT, "data.num_views=5") == 0
    assert new_place.manifest("build").key.num_views == 1
    assert new_place.run("distill", "online", "run.seed=3") == 0
    assert new_place.run("distill", "cached", "run.seed=3", EXACT, CACHED) == 0
    assert_same_student(new_place, "cached", "online")


def test_a_part_of_the_rows_of_a_cache(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    fewer = [*VIEWS, "data.validation_fraction=0.3", "run.seed=0"]
    assert place.run("distill", "online-fewer", *fewer) == 0
    assert place.run("distill", "cached-fewer", *fewer, EXACT, CACHED) == 0
    assert_same_student(place, "cached-fewer", "online-fewer")
    capsys.readouterr()
    assert place.run("distill", "refused", *VIEWS, "data.validation_fraction=0.05", EXACT, CACHED) == 2
    assert "lacks 12 of the 228 rows of the train split, the first sample" in capsys.readouterr().err


def test_windows_of_rows(place: Workplace) -> None:
    """Data that is not in memory: the same as in memory where a window holds all, and as online where it does not."""
    large = [*VIEWS, "data.memory_bytes=0"]
    assert place.run("distill", "cached-window", *large, EXACT, CACHED) == 0
    assert_same_student(place, "cached-window", "online")
    small = [*large, "data.window_bytes=40000"]
    assert place.run("distill", "online-windows", *small) == 0
    assert place.run("distill", "cached-windows", *small, EXACT, CACHED) == 0
    assert_same_student(place, "cached-windows", "online-windows")
    assert place.result("online-windows")["metrics"] != place.result("online")["metrics"]


def test_a_build_by_windows_is_the_same(place: Workplace, new_place: Workplace) -> None:
    assert new_place.run("cache build", "build", *VIEWS, EXACT, "data.memory_bytes=0", "data.window_bytes=40000") == 0
    parts = [workplace.manifest("build").parts for workplace in (new_place, place)]
    assert parts[0] == parts[1]


def test_half_precision_is_close(place: Workplace) -> None:
    assert place.run("cache build", "half", *VIEWS) == 0
    assert place.run("distill", "cached-half", *VIEWS, CACHED) == 0
    stored, exact = place.logits("half"), place.logits("build")
    assert stored[0].dtype == "float16"
    for view in range(3):
        np.testing.assert_allclose(read_view(*stored, view), read_view(*exact, view), atol=2e-3)
    losses = [
        [event["metrics"]["train/loss"] for event in place.events(name, "step")] for name in ("cached-half", "online")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


def test_select_perturbation_is_served_too(place: Workplace) -> None:
    auto = ["loss=ptloss", "loss.perturbation_from=auto", "selection.num_candidates=8", "data.validation_fraction=0.5"]
    assert place.run("distill", "online-selected", *VIEWS, *auto) == 0
    assert place.run("distill", "cached-selected", *VIEWS, *auto, EXACT, CACHED) == 0
    assert_same_student(place, "cached-selected", "online-selected")


# --- what it depends on -------------------------------------------------------------------------------------------

OTHER = {
    "teacher": ["teacher.checkpoint={folder}/other.pt"],
    "architecture.hidden": ["teacher.hidden=[9]", "teacher.checkpoint={folder}/narrow.pt"],
    "preprocessing.mean": ["teacher.mean=[0.4,0.5,0.5]"],
    "preprocessing.image_size": ["teacher.image_size=[12,12]"],
    "precision": ["teacher.precision=bf16"],
    "data": ["data.path={folder}/more"],
    "augment.flip": ["data.augment.flip=false"],
    "augment.crop_padding": ["data.augment.crop_padding=2"],
    "augment.random_resized_crop": ["data.augment.crop_padding=0", "data.augment.random_resized_crop=[0.5,1.0]"],
    "augment.brightness": ["data.augment.brightness=0.1"],
    "augment.contrast": ["data.augment.contrast=0.1"],
    "augment.saturation": ["data.augment.saturation=0.1"],
    "augment.randaugment": ["data.augment.randaugment=1"],
    "augment.randaugment_magnitude": ["data.augment.randaugment_magnitude=3"],
    "augment.mixup": ["data.augment.mixup=0.2"],
    "augment.cutmix": ["data.augment.cutmix=1.0"],
    "seed": ["data.view_seed=1"],
    "num_views": ["data.num_views=4"],
    "num_classes": ["data.num_classes=4", "teacher.checkpoint={folder}/classes.pt"],
    "format": ["cache=topk", "cache.k=2"],
    "dtype": ["cache.dtype=float16"],
}
ALSO = {  # what cannot be changed alone
    "architecture.hidden": {"teacher"},
    "augment.random_resized_crop": {"augment.crop_padding"},
    "num_classes": {"teacher"},
    "format": {"k"},
}


@pytest.fixture(scope="module")
def others(place: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers and data that the cache is not of."""
    folder = tmp_path_factory.mktemp("others")
    save_teacher(folder / "other.pt", seed=1)
    save_teacher(folder / "narrow.pt", hidden=9)
    save_teacher(folder / "classes.pt", num_classes=4)
    write_pictures(folder / "more", num_rows=NUM_ROWS + 1, labels=np.append(LABELS, 0))
    shutil.copytree(place.caches, folder / "cache")  # the only one there, whatever other tests build
    for cache in (folder / "cache").iterdir():
        if cache.name != place.result("build")["key"]:
            shutil.rmtree(cache)
    return folder


@pytest.mark.parametrize("field", OTHER)
def test_each_ingredient_is_refused_by_name(
    place: Workplace, others: Path, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [text.format(folder=others) for text in OTHER[field]]
    capsys.readouterr()
    code = place.run("distill", "refused", *VIEWS, EXACT, CACHED, f"cache.path={others / 'cache'}", *overrides)
    said = capsys.readouterr().err
    assert code == 2
    assert len(said.splitlines()) == 1
    assert said.startswith(f"CacheError: cache.path={others / 'cache'} holds no cache of these logits: the nearest, ")
    listed = said.split("differs in ")[1].split("; build it with `python -m pipeline cache build`")[0]
    named = {pair.split(" (stored ")[0] for pair in listed.split("), ")}
    assert named == {field} | ALSO.get(field, set())
    assert all(" wanted " in pair for pair in listed.split("), "))
    assert not (place.folder / "runs" / "refused").exists()


def test_every_ingredient_of_the_key_is_tried(place: Workplace) -> None:
    key = place.manifest("build").key.model_dump()
    augment = {f"augment.{name}" for name in key.pop("augment")}
    assert augment == {field for field in OTHER if field.startswith("augment.")}
    assert set(key) - {field.partition(".")[0] for field in OTHER} == {"k"}


def test_the_number_of_classes_kept_is_refused_by_name(
    new_place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert new_place.run("cache build", "build", "cache=topk", "cache.k=2") == 0
    capsys.readouterr()
    assert new_place.run("distill", "refused", "cache=topk", "cache.k=1", CACHED) == 2
    assert "differs in k (stored 2, wanted 1);" in capsys.readouterr().err


def test_labels_batches_and_losses_are_no_ingredients(place: Workplace, tmp_path: Path) -> None:
    write_pictures(tmp_path, labels=(LABELS + 1) % 3)
    overrides = [*VIEWS, f"data.path={tmp_path}", "loss=dist", "student.hidden=[5]", "train.optimizer.lr=0.01"]
    assert place.run("distill", "online-relabelled", *overrides) == 0
    assert place.run("distill", "cached-relabelled", *overrides, EXACT, CACHED) == 0
    assert_same_student(place, "cached-relabelled", "online-relabelled")
    assert place.run("distill", "batches", *VIEWS, EXACT, CACHED, "train.batch_size=32") == 0


# --- rows that cannot be decoded ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mixing", [(), ("data.augment.mixup=0.4",)], ids=["plain", "mixup"])
def test_damaged_rows_are_skipped_alike(
    new_place: Workplace, mixing: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(new_place.folder / "data", damaged=[5, 77, 78])
    skip = [*VIEWS, *mixing, "data.on_bad_row=skip"]
    assert new_place.run("cache build", "build", *skip, EXACT) == 0
    assert "skipped, listed in" in capsys.readouterr().out
    manifest = new_place.manifest("build")
    absent = manifest.absent.tolist()
    assert absent
    assert set(absent) <= {5, 77, 78}
    assert manifest.num_rows == 3 * (NUM_TRAINED - len(absent))
    assert new_place.run("distill", "online", *skip) == 0
    assert new_place.run("distill", "cached", *skip, EXACT, CACHED) == 0
    assert_same_student(new_place, "cached", "online")
    assert new_place.result("cached")["num_bad_rows"] == new_place.result("online")["num_bad_rows"]

    # Repaired, of the same size, which no footer shows.
    write_pictures(new_place.folder / "data")
    capsys.readouterr()
    assert new_place.run("distill", "repaired", *skip, EXACT, CACHED) == 1
    said = capsys.readouterr().err
    assert "CacheError: the cache has no logits of sample" in said
    assert "which could not be decoded when it was built, but now can: the data has changed" in said
    assert len(said.splitlines()) == 1


# --- top-k --------------------------------------------------------------------------------------------------------

DIGITS = ("data=digits", "train.epochs=2", "train.batch_size=64", "train.optimizer.lr=0.01")


def topk(k: int) -> list[str]:
    return ["cache=topk", f"cache.k={k}", EXACT]


@pytest.fixture(scope="module")
def digits(place: Workplace) -> list[str]:
    """Ten classes, and a teacher that tells them apart."""
    overrides = ["data=digits", "teacher.checkpoint=null", "train.epochs=3"]
    assert place.run("train-teacher", "digits", *overrides, "cache.path=null") == 0
    assert place.result("digits")["metrics"]["val/top1"] > 0.5
    return [*DIGITS, f"teacher.checkpoint={place.folder / 'runs' / 'digits'}"]


@pytest.mark.parametrize("temperature", [4, 3])
def test_topk_is_close_to_online(place: Workplace, digits: list[str], temperature: int) -> None:
    name, loss = f"t{temperature}", f"loss.temperature={temperature}"
    assert place.run("distill", f"online-{name}", *digits, loss) == 0
    online = np.array([event["metrics"]["train/kd"] for event in place.events(f"online-{name}", "step")])
    errors = []
    for k in (5, 10):
        assert place.run("cache build", f"top{k}-{name}", *digits, *topk(k)) == 0
        assert place.run("distill", f"cached-top{k}-{name}", *digits, *topk(k), loss, CACHED) == 0
        cached = [event["metrics"]["train/kd"] for event in place.events(f"cached-top{k}-{name}", "step")]
        errors.append(np.abs(np.array(cached) / online - 1))
    assert errors[0][0] < 0.02  # the students part after that
    assert errors[0].max() < 0.2
    assert errors[1].max() < 1e-5  # every class is kept


def test_what_topk_loses_is_measured_and_printed(
    place: Workplace, digits: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.run("cache build", "measured", *digits, "cache=topk", "cache.k=3") == 0
    printed = capsys.readouterr().out
    assert "what is lost by keeping 3 of 10 classes, on validation rows" in printed
    table = (place.folder / "runs" / "measured" / "topk_errors.txt").read_text()
    assert table.strip().splitlines()[-1].split()[0] == "20"
    tracked = import_mlflow().MlflowClient(f"sqlite:///{place.folder / 'mlflow.db'}")
    files = {file.path for file in tracked.list_artifacts(place.result("measured")["mlflow_run_id"], "cache")}
    assert files == {"cache/cache.json", "cache/topk_errors.txt"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss=dist"], "cache.format: a top-k cache lacks most of the classes that loss=dist compares"),
        (["loss=kd", "loss.standardise=true"], "a top-k cache lacks most of the classes that loss=kd compares"),
        (["loss.temperature=30"], "at temperatures 1 to 20, got 30; set a temperature between them"),
    ],
)
def test_what_topk_cannot_serve_is_refused(
    place: Workplace, digits: list[str], overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert place.run("distill", "refused", *digits, *topk(5), *overrides, CACHED) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (place.folder / "runs" / "refused").exists()
    assert place.run("cache build", "refused", *digits, *topk(11)) == 2
    assert "cache.k=11 is more than the 10 classes there are" in capsys.readouterr().err
    assert not (place.folder / "runs" / "refused").exists()
