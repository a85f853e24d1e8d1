"""Data on ``s3://``: the same rows as from a local folder, and the sentences for what can go wrong on the way."""

from __future__ import annotations

import pickle
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config.compose import compose
from pipeline.config.validate import build_config
from pipeline.contracts.columns import SPLITS, InputSpec
from pipeline.data import (
    AugmentParams,
    BlockPlanner,
    DataParams,
    DataSource,
    EpochOrder,
    decode_block,
    read_blocks,
    storage,
    waiting,
)
from pipeline.data.sources.image_folder import ImageFolderParams
from pipeline.data.sources.parquet import ParquetParams
from pipeline.errors import ConfigError, DataError
from tests.integration.s3_server import S3Server, run_s3

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 6, 5, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder ``rows`` of Parquet files and a folder ``images``, with the same images."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "rows").mkdir()
    contents = []
    for number, pixels in enumerate(PIXELS):
        file = folder / "images" / f"class{number % 4}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
        contents.append(file.read_bytes())
    table = pa.table({"image": contents, "label": np.arange(40) % 4})
    pq.write_table(table.slice(0, 30), folder / "rows" / "train.parquet", row_group_size=7)
    pq.write_table(table.slice(30), folder / "rows" / "test.parquet")
    return folder


@pytest.fixture(scope="module")
def server(local: Path) -> Iterator[S3Server]:
    with run_s3() as s3:
        s3.copy(local, "flowers")
        yield s3


@pytest.fixture(autouse=True)
def _credentials(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(waiting, "PATIENCE", waiting.Patience(first_s=0.1, start_s=1.0))


def params_of(kind: str, path: str, **values: Any) -> DataParams:
    if kind == "rows":
        return ParquetParams(path=f"{path}/rows", **values)
    return ImageFolderParams(path=f"{path}/images", **values)


def on_s3(params: DataParams, server: S3Server) -> DataParams:
    return params.model_copy(update={"path": params.path + server.settings})  # type: ignore[attr-defined]


def train_blocks(source: DataSource) -> list[dict[str, np.ndarray]]:
    reader = source.load("train") if source.in_memory("train") else source.split("train")
    planner = BlockPlanner(EpochOrder(reader, 0, 2_000), reader.num_rows, 8, None)
    # As in another process: reader and decoder come by value.
    reader, decoder = pickle.loads(pickle.dumps((reader, source.decoder("train"))))
    augment = AugmentParams(flip=True)
    return [decode_block(read_blocks(reader, [planner.block(block)]), decoder, augment, 0) for block in range(4)]


@pytest.mark.parametrize("memory_bytes", [0, 2**30])
@pytest.mark.parametrize("kind", ["rows", "images"])
def test_batches_are_those_of_a_local_folder(local: Path, server: S3Server, kind: str, memory_bytes: int) -> None:
    expected = params_of(kind, str(local), memory_bytes=memory_bytes).open()
    source = on_s3(params_of(kind, "s3://flowers", memory_bytes=memory_bytes), server).open()
    assert source.spec == expected.spec
    assert source.fingerprint == expected.fingerprint
    for split in SPLITS:
        tables = [opened.split(split).read(opened.split(split).sample_ids) for opened in (source, expected)]
        assert tables[0].equals(tables[1])
    for block, same in zip(train_blocks(source), train_blocks(expected), strict=True):
        assert block.keys() == same.keys()
        for name in block:
            np.testing.assert_array_equal(block[name], same[name])


@pytest.mark.parametrize("kind", ["rows", "images"])
def test_rows_to_predict(local: Path, server: S3Server, kind: str) -> None:
    spec = InputSpec("image", (3, 6, 5), ("a", "b"))
    expected, _ = params_of(kind, str(local)).open_rows(spec)
    reader, decoder = on_s3(params_of(kind, "s3://flowers"), server).open_rows(spec)
    assert reader.read(reader.sample_ids).equals(expected.read(expected.sample_ids))
    assert decoder.files[0].path.removeprefix("s3://").startswith(f"flowers/{kind}/")
    assert "endpoint" not in decoder.files[0].path


def test_the_address_may_come_from_the_environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}/")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    assert params_of("rows", "s3://flowers").open().split("train").num_rows > 0
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    uri = params_of("rows", f"s3://flowers/rows?endpoint_override=http://127.0.0.1:{server.port}")
    assert uri.model_copy(update={"path": uri.path.removesuffix("/rows")}).open().split("train").num_rows > 0  # type: ignore[attr-defined]


def test_no_credentials_travel_with_a_reader(server: S3Server) -> None:
    for kind in ("rows", "images"):
        source = on_s3(params_of(kind, "s3://flowers"), server).open()
        content = pickle.dumps((source, source.split("train"), source.decoder("train")))
        assert server.secret_key.encode() not in content
        assert server.access_key.encode() not in content


def expect(params: DataParams, sentence: str) -> None:
    begin = time.monotonic()
    with pytest.raises(DataError, match=sentence) as caught:
        params.open()
    assert "\n" not in caught.value.message
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("kind", ["rows", "images"])
@pytest.mark.parametrize(("variable", "value"), [("AWS_ACCESS_KEY_ID", "AKIA0000"), ("AWS_SECRET_ACCESS_KEY", "x")])
def test_wrong_credentials(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, kind: str, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    expect(
        on_s3(params_of(kind, "s3://flowers"), server),
        r"^data\.path=s3://flowers/.*: the server refuses the credentials; set AWS_ACCESS_KEY_ID and .*DENIED\)\.$",
    )


@pytest.mark.parametrize("kind", ["rows", "images"])
def test_no_such_place(server: S3Server, kind: str) -> None:
    expect(on_s3(params_of(kind, "s3://flower"), server), r"^data\.path=.*: there is no bucket 'flower'; correct")
    expect(
        on_s3(params_of(kind, "s3://flowers/2024"), server), r"^data\.path=s3://flowers/2024/.* does not exist; give"
    )


def test_files_that_go_away_during_a_run(local: Path, server: S3Server) -> None:
    server.copy(local, "passing")
    sources = [on_s3(params_of(kind, "s3://passing"), server).open() for kind in ("rows", "images")]
    for kind in ("rows", "images"):
        server.writer.delete_dir(f"passing/{kind}")
    for source in sources:
        reader = source.split("train")
        with pytest.raises(DataError, match=r"passing/(rows/train\.parquet|images/class0/\d+\.png).*restore it"):
            reader.read(reader.sample_ids)


@pytest.mark.parametrize("kind", ["rows", "images"])
def test_no_server(kind: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = params_of(kind, "s3://flowers").path + f"?endpoint_override=127.0.0.1:{port}&scheme=http"  # type: ignore[attr-defined]
    params = params_of(kind, "").model_copy(update={"path": path})
    expect(params, r"^data\.path=.*: the server cannot be reached; check the address: \?endpoint_override=.*")


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "REQUEST_TIMEOUT_S", 1.0)
    monkeypatch.setattr(storage, "MAX_ATTEMPTS", 2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        path = f"s3://flowers/rows?endpoint_override=127.0.0.1:{silent.getsockname()[1]}&scheme=http&region=x"
        expect(ParquetParams(path=path), r"the server cannot be reached; check the address: .*Operation too slow")
    assert storage.MAX_ATTEMPTS * (storage.CONNECT_TIMEOUT_S + storage.REQUEST_TIMEOUT_S) <= 60


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("s3://flowers/rows?access=1", r"got the setting 'access'; correct it"),
        ("s3:///rows", r"got '' for a bucket; correct it"),
        ("s3://me@flowers/rows", r"got 'me@flowers' for a bucket"),
        ("gopher://flowers/rows", r"cannot be opened \(.*\); give a folder, or a URI such as s3://bucket/folder"),
    ],
)
def test_addresses_that_mean_nothing(path: str, sentence: str) -> None:
    expect(ParquetParams(path=path), sentence)


@pytest.mark.parametrize(
    "path",
    [
        "s3://AKIA0000:hunter2@flowers/rows",
        "s3://AKIA0000:hun/ter2+hunter2@flowers/rows",
        "s3://flowers/rows?access_key=AKIA0000&secret_key=hunter2",
        "s3://flowers/rows?session_token=hunter2",
    ],
)
def test_secrets_in_an_address_are_refused_and_not_repeated(path: str) -> None:
    with pytest.raises(ConfigError, match=r"^data\.path: holds a password, .* \(AWS_ACCESS_KEY_ID") as refused:
        build_config(compose(["data=parquet", f"data.path='{path}'", "loss=cross_entropy"]), "distill")
    with pytest.raises(DataError, match=r"^data\.path holds a secret, .* set AWS_ACCESS_KEY_ID") as caught:
        ParquetParams(path=path).open()
    assert "hunter2" not in refused.value.message + caught.value.message
