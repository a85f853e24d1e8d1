"""A cache on ``s3://``: built, gone on with, trained from, verified and deleted as a local one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from tests.integration.s3_server import S3Server, run_s3
from tests.unit.cached_runs import CACHED, EXACT, VIEWS, Workplace, assert_same_student


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with run_s3() as s3:
        s3.writer.create_dir("bucket")
        yield s3


def test_a_cache_on_s3(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    place = Workplace.make(tmp_path)
    remote = [*VIEWS, EXACT, f"cache.path='s3://bucket/cache{server.settings}'"]
    assert place.run("cache build", "remote", *remote) == 0
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
    assert place.run("cache verify", "-", *remote, "rows=all") == 0
    assert "ok: 36 parts, 648 rows, " in capsys.readouterr().out

    assert place.run("distill", "online", *VIEWS) == 0
    for memory in ("data.memory_bytes=1000000000", "data.memory_bytes=0"):  # in memory, and part by part
        assert place.run("distill", f"cached-{memory}", *remote, CACHED, memory) == 0
        assert_same_student(place, f"cached-{memory}", "online")

    assert place.run("cache info", "-", *remote) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"this configuration asks for {digest}: complete"
    assert place.run("cache prune", "-", *remote, f"name={digest}") == 0
    assert not [
        info for info in server.writer.get_file_info(pafs.FileSelector("bucket", recursive=True)) if info.is_file
    ]
    for path in (path for path in (tmp_path / "runs").rglob("*") if path.is_file()):
        assert server.secret_key.encode() not in path.read_bytes()
