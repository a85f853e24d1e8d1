"""A storage service that does not answer is waited for; what it refuses is said at once."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from pipeline.config.load import load_config
from pipeline.config.request import Request
from pipeline.contracts.events import Event
from pipeline.data import DataParams
from pipeline.data.cache import open_build, verify_files
from pipeline.data.cache.folder import open_folder
from pipeline.data.sources.image_folder import ImageFolderParams
from pipeline.data.sources.parquet import ParquetParams
from pipeline.data.sources.parquet_reader import _CACHE
from pipeline.data.waiting import ask_service, ask_storage, tell_waits
from pipeline.errors import CacheError, DataError, StorageError
from pipeline.search import TrialTask
from pipeline.trials import trial
from tests.unit.cached_runs import GROUP_ROWS, NUM_ROWS, draw_pictures, write_pictures
from tests.unit.caches import make_cache, make_key, make_reader
from tests.unit.unsteady import DENIED, REFUSED, SLOW_DOWN, Time, Unsteady, always, never, put_before, twice

PLACE = "s3://flowers/2024/train.parquet"


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)


class Fails:
    """An action that raises so many times before it returns; for ever where that is none."""

    def __init__(self, text: str, times: int | None = None) -> None:
        self._text, self._times = text, times
        self.num_calls = 0

    def __call__(self) -> str:
        self.num_calls += 1
        if self._times is None or self.num_calls <= self._times:
            raise OSError(self._text)
        return "content"


def ask(action: Callable[[], Any], service: str = "a server") -> Any:
    return ask_service(service, PLACE, action)


# --- how long, and for what ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        SLOW_DOWN,
        REFUSED,
        "AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body.",
        "AWS Error UNKNOWN (HTTP status 500) during HeadObject operation: No response body.",
        "AWS Error UNKNOWN (HTTP status 429) during ListObjectsV2 operation: Unable to parse ExceptionName: Too",
        "AWS Error SERVICE_UNAVAILABLE during GetObject operation: ",
        "AWS Error INTERNAL_FAILURE during ListObjectsV2 operation: please",
        "AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 6, Could not resolve hostname; Details: x",
        "AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 28, Timeout was reached; Details: x",
    ],
)
def test_what_passes_is_waited_for(time: Time, text: str) -> None:
    action = Fails(text, times=3)
    assert ask(action) == "content"
    assert action.num_calls == 4
    assert len(time.pauses) == 3


@pytest.mark.parametrize(
    "text",
    [
        DENIED,
        "AWS Error UNKNOWN (HTTP status 403) during HeadObject operation: No response body.",
        "AWS Error UNKNOWN (HTTP status 501) during HeadObject operation: No response body.",
        "AWS Error NO_SUCH_BUCKET during ListObjectsV2 operation: gone",
        "AWS Error UNKNOWN (HTTP status 400) during ListObjectsV2 operation: ExpiredToken",
        "AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 60, SSL peer certificate was not OK",
        "Parquet file size is 500503 bytes",
    ],
)
def test_what_is_refused_is_said_at_once(time: Time, text: str) -> None:
    action = Fails(text)
    with pytest.raises(OSError, match=re.escape(text)):
        ask(action)
    assert action.num_calls == 1
    assert time.pauses == []


def test_pauses_grow_and_are_never_the_same(time: Time) -> None:
    with pytest.raises(StorageError):
        ask(Fails(SLOW_DOWN))
    longest = [min(0.5 * 2**number, 15.0) for number in range(len(time.pauses))]
    for pause, bound in zip(time.pauses[:-1], longest, strict=False):  # the last is what is left
        assert bound / 2 <= pause <= bound
    assert sum(time.pauses) == pytest.approx(300)
    assert len(set(time.pauses)) == len(time.pauses)
    assert len(time.pauses) < 60


def test_one_that_is_given_up_is_no_damaged_file(time: Time) -> None:
    with pytest.raises(StorageError) as caught:
        ask(Fails(SLOW_DOWN))
    assert caught.value.message == (
        "s3://flowers/2024/train.parquet: the storage service was not available for 300 s (answered SLOW_DOWN); once "
        "it is, go on with resume=RUN, or give the command again where no run had begun: what was saved is whole."
    )
    assert pickle.loads(pickle.dumps(caught.value)).passes
    assert not DataError("the file is damaged").passes


def test_an_address_where_nothing_ever_answered_is_given_up_early(time: Time) -> None:
    with pytest.raises(OSError, match="AWS Error NETWORK_CONNECTION"):
        ask(Fails(REFUSED))
    assert sum(time.pauses) == pytest.approx(20)


def test_an_address_that_swallows_everything_is_tried_once(time: Time) -> None:
    def action() -> None:
        time.now += 40  # until the AWS library gives up
        raise OSError(REFUSED)

    with pytest.raises(OSError, match="AWS Error NETWORK_CONNECTION"):
        ask(action)
    assert time.pauses == []


def answered_before() -> None:
    assert ask(lambda: 1) == 1


def refused_before() -> None:
    with pytest.raises(OSError, match="DENIED"):
        ask(Fails(DENIED))


def under_way() -> None:
    tell_waits(Told())


@pytest.mark.parametrize("before", [answered_before, refused_before, under_way])
def test_one_that_answered_or_serves_a_run_is_waited_for(time: Time, before: Callable[[], None]) -> None:
    before()
    with pytest.raises(StorageError, match=r"not available for 300 s \(unreachable \(Could not connect to server\)\);"):
        ask(Fails(REFUSED))


def test_another_that_answered_says_nothing_of_this_one(time: Time) -> None:
    answered_before()
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        ask(Fails(REFUSED), service="another server")


def test_a_disk_is_asked_once(time: Time, tmp_path: Path) -> None:
    action = Fails(SLOW_DOWN)
    with pytest.raises(OSError, match="SLOW_DOWN"):
        ask_storage(pafs.LocalFileSystem(), str(tmp_path), action)
    assert action.num_calls == 1


# --- what is told -------------------------------------------------------------------------------------------------


class Told:
    """Keeps events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


def test_a_long_wait_is_told_now_and_then(time: Time, capsys: pytest.CaptureFixture[str]) -> None:
    told = Told()
    tell_waits(told)
    assert ask(Fails(SLOW_DOWN, times=4)) == "content"  # over within five seconds
    assert told.events == []
    assert ask(Fails(SLOW_DOWN, times=14)) == "content"
    assert {event.kind for event in told.events} == {"wait"}
    *waits, end = [event.data for event in told.events]
    assert all(data["waiting"] and data["name"] == "s3://flowers" for data in waits)
    assert waits[0]["message"].startswith("waiting for s3://flowers: answered SLOW_DOWN for ")
    assert re.search(r" for \d+ s, trying again for up to 2\d\d s$", waits[0]["message"])
    assert 2 <= len(waits) <= sum(time.pauses) / 30 + 1
    assert not end["waiting"]
    assert end["message"].startswith("s3://flowers answers again after ")
    assert capsys.readouterr().err == ""


def test_threads_of_a_process_tell_it_once(time: Time) -> None:
    told = Told()
    tell_waits(told)

    def other() -> str:
        """Fails too, and while it waits another does."""
        return str(ask(Fails(SLOW_DOWN, times=6)))

    attempts = iter([True] * 6 + [False])

    def action() -> str:
        if next(attempts):
            other()
            raise OSError(SLOW_DOWN)
        return "content"

    assert ask(action) == "content"
    assert 0 < sum(event.data["waiting"] for event in told.events) <= sum(time.pauses) / 5


def test_without_a_run_the_console_is_told(time: Time, capsys: pytest.CaptureFixture[str]) -> None:
    tell_waits(Told())
    tell_waits(None)
    ask(Fails(REFUSED, times=6))
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("waiting for s3://flowers: unreachable (Could not connect to server) for ")
    assert last.startswith("s3://flowers answers again after ")


# --- data ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Unsteady:
    handler = Unsteady()
    put_before(handler, monkeypatch)
    return handler


def write_rows(folder: Path) -> DataParams:
    write_pictures(folder)
    return ParquetParams(path=str(folder), on_bad_row="skip")


def write_images(folder: Path) -> DataParams:
    for number, picture in enumerate(draw_pictures(30)):
        file = folder / f"class{number % 3}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture)
    return ImageFolderParams(path=str(folder), on_bad_row="skip")


@pytest.fixture
def _nothing_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_CACHE, "_groups", type(_CACHE._groups)())


def read_train(params: DataParams) -> pa.Table:
    reader = params.open().split("train")
    return reader.read(reader.sample_ids)


@pytest.mark.usefixtures("_nothing_read")
@pytest.mark.parametrize("write", [write_rows, write_images])
def test_rows_are_those_that_a_steady_service_gives(
    time: Time, service: Unsteady, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any
) -> None:
    params = write(tmp_path)
    expected = read_train(params)
    monkeypatch.setattr(_CACHE, "_groups", type(_CACHE._groups)())
    service.fail(twice)
    assert read_train(params).equals(expected)
    assert service.num_failed > 20


@pytest.mark.usefixtures("_nothing_read")
def test_half_a_row_group_is_read_again_as_a_whole(
    time: Time, service: Unsteady, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = write_rows(tmp_path).open().split("train")
    real, left = pq.ParquetFile.read_row_group, [3]

    def read_row_group(self: Any, index: int, **options: Any) -> pa.Table:
        table = real(self, index, **options)
        if left[0]:
            left[0] -= 1
            raise OSError(SLOW_DOWN)  # when all of it had come
        return table

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_row_group)
    assert reader.read(reader.sample_ids)["sample_id"].to_pylist() == reader.sample_ids.tolist()
    assert len(time.pauses) == 3
    assert reader.num_rows > NUM_ROWS - 2 * GROUP_ROWS - 8


@pytest.mark.usefixtures("_nothing_read")
@pytest.mark.parametrize("write", [write_rows, write_images])
def test_no_row_is_skipped_because_its_service_is_away(
    time: Time, service: Unsteady, tmp_path: Path, write: Any
) -> None:
    params = write(tmp_path)
    reader = params.open().split("train")
    service.fail(always)
    with pytest.raises(StorageError, match=r"^py::unsteady://.*: the storage service was not available for \d+ s"):
        reader.read(reader.sample_ids[:8])
    with pytest.raises(StorageError, match="not available"):
        params.open()
    service.fail(lambda operation, path, number: operation == "open_input_file", DENIED)
    with pytest.raises(DataError, match="ACCESS_DENIED"):
        reader.read(reader.sample_ids[:8])
    assert service.num_failed <= 8  # a thread each


# --- caches -------------------------------------------------------------------------------------------------------


def test_a_cache_is_built_and_read_through_an_unsteady_service(time: Time, service: Unsteady, tmp_path: Path) -> None:
    service.fail(twice)
    cache = make_cache(tmp_path)
    assert verify_files(cache.folder) == []
    assert service.num_failed > 50
    cache.folder.delete_folder()
    cache.folder.delete_folder()  # again, as where the first answer was lost
    assert open_folder(str(tmp_path)).list_files() == {}


def test_a_service_that_is_away_has_no_damaged_files(time: Time, service: Unsteady, tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    service.fail(always)
    with pytest.raises(StorageError, match=r"/manifest.json: the storage service was not available"):
        verify_files(cache.folder)
    service.fail(lambda operation, path, number: "part-" in path)
    with pytest.raises(StorageError, match=r"part-\d+.arrow: the storage service was not available"):
        verify_files(cache.folder)


def test_parts_of_a_cache_are_not_deleted_because_they_cannot_be_read(
    time: Time, service: Unsteady, tmp_path: Path
) -> None:
    cache = make_cache(tmp_path)
    cache.folder.delete("manifest.json")  # what it was built for is not known then: every part is looked at
    before = cache.folder.list_files()
    service.fail(lambda operation, path, number: operation == "open_input_file")
    with pytest.raises(StorageError, match="part"):
        open_build(str(tmp_path), make_key(), make_reader())
    service.fail(never)
    assert cache.folder.list_files() == before


def test_what_a_cache_is_refused_is_said_at_once(time: Time, service: Unsteady, tmp_path: Path) -> None:
    service.fail(lambda operation, path, number: operation == "open_output_stream", DENIED)
    with pytest.raises(CacheError, match=r"the server refuses the credentials"):
        open_folder(str(tmp_path)).write("x", b"content")
    assert (service.num_failed, time.pauses) == (1, [])
    assert list(tmp_path.iterdir()) == []


# --- trials of a search -------------------------------------------------------------------------------------------


def test_a_trial_is_tried_again_but_not_one_that_would_fail_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(Request("distill", ("loss=cross_entropy", f"run.dir={tmp_path / 'trial'}"))).config
    task = TrialTask("0000", config.model_dump_json(), judged=True)
    inputs = trial.TrialInputs(None, None, None, None, None, "val/top1", {})  # type: ignore[arg-type]

    def fail_with(error: Exception) -> None:
        def train(*arguments: Any) -> None:
            raise error

        monkeypatch.setattr(trial, "_train", train)
        trial.run_trial(inputs, task, lambda epoch, value: None)

    with pytest.raises(StorageError):  # which Tune answers by another try
        fail_with(StorageError("the storage service was not available"))
    assert not (tmp_path / "trial" / "result.json").exists()
    fail_with(DataError("a damaged image"))
    assert '"failed"' in (tmp_path / "trial" / "result.json").read_text()
