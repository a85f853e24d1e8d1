"""A cache on ``s3://``: built, gone on with, trained from, verified and deleted as a local one, and with patience."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from pipeline.data import storage, waiting
from tests.integration.s3_server import S3Server, run_s3
from tests.unit.cached_runs import CACHED, EXACT, VIEWS, Workplace, assert_same_student


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with run_s3() as s3:
        s3.writer.create_dir("bucket")
        yield s3


def assert_waited(server: S3Server, place: Workplace, name: str, num_refused: int) -> None:
    """A run met so many answers of 503, and told that it waited for the server."""
    assert server.num_refused == num_refused
    first, last = place.events(name, "wait")
    assert first["message"].startswith(f"waiting for {first['name']}: answered ")
    assert last["message"].startswith(f"{first['name']} answers again after ")


def test_a_cache_on_s3(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    place = Workplace.make(tmp_path)
    server.copy(tmp_path / "data", "pictures")
    # More refusals than the AWS library bears are told by it in a moment, and are waited for a moment.
    monkeypatch.setattr(storage, "MAX_ATTEMPTS", 1)
    monkeypatch.setattr(waiting, "PATIENCE", waiting.Patience(first_s=0.1, tell_after_s=0.0))
    remote = [*VIEWS, EXACT, f"cache.path='s3://bucket/cache{server.settings}'"]
    server.refuse(3, after=60)
    assert place.run("cache build", "remote", *remote) == 0
    assert_waited(server, place, "remote", 3)
    assert place.run("cache build", "local", *VIEWS, EXACT) == 0
    digest = place.result("remote")["key"]
    selector = pafs.FileSelector(f"bucket/cache/{digest}", recursive=True)
    files = {info.path: info.size for info in server.writer.get_file_info(selector) if info.is_file}
    parts = {name: size for name, size in files.items() if name.endswith(".arrow")}
    assert set(files) - set(parts) == {f"bucket/cache/{digest}/manifest.json"}
    for part in place.manifest("local").parts:
        with server.writer.open_input_file(f"bucket/cache/{digest}/{part.name}") as file:
            assert file.read() == (place.caches / digest / part.name).read_bytes()

    # Some files are lost, and one is damaged: only these are computed again.
    for name in sorted(parts)[3:9]:
        server.writer.delete_file(name)
    with server.writer.open_output_stream(sorted(parts)[20]) as file:
        file.write(b"ARROW1 and nothing else")
    capsys.readouterr()
    assert place.run("distill", "refused", *remote, CACHED) == 2
    said = capsys.readouterr().err
    assert f"CacheError: s3://bucket/cache/{digest}/view-0000/part-00000" in said
    assert "endpoint_override" not in said
    assert place.run("cache verify", "-", *remote) == 1
    assert f"7 files of s3://bucket/cache/{digest}:" in capsys.readouterr().err
    assert place.run("cache build", "again", *remote) == 0
    assert 7 < place.result("again")["metrics"]["cache/rows_computed"] <= 7 * 20
    server.refuse(10, after=20)
    assert place.run("cache verify", "-", *remote, "rows=all") == 0
    assert server.num_refused == 10
    assert "ok: 36 parts, 648 rows, " in capsys.readouterr().out

    assert place.run("distill", "online", *VIEWS) == 0
    assert place.run("distill", "in-memory", *remote, CACHED, "data.memory_bytes=1000000000") == 0
    assert_same_student(place, "in-memory", "online")
    # Part by part, with the data there too.
    monkeypatch.setattr(storage, "MAX_ATTEMPTS", 4)
    server.refuse(storage.MAX_ATTEMPTS + 2, after=120)
    data = f"data.path='s3://pictures{server.settings}'"
    assert place.run("distill", "by-parts", *remote, CACHED, "data.memory_bytes=0", data, "data.on_bad_row=skip") == 0
    assert_waited(server, place, "by-parts", storage.MAX_ATTEMPTS + 2)
    assert_same_student(place, "by-parts", "online")
    assert place.result("by-parts")["num_bad_rows"] == 0

    assert place.run("cache info", "-", *remote) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"this configuration asks for {digest}: complete"
    assert place.run("cache prune", "-", *remote, f"name={digest}") == 0
    assert not [
        info for info in server.writer.get_file_info(pafs.FileSelector("bucket", recursive=True)) if info.is_file
    ]
    for path in (path for path in (tmp_path / "runs").rglob("*") if path.is_file()):
        assert server.secret_key.encode() not in path.read_bytes()
