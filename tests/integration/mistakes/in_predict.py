"""Mistakes in ``predict``."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from tests.integration.mistakes.table import Place, mistake


def predict(place: Place, *overrides: str) -> list[str]:
    return ["predict", f"run={place.teacher}", *overrides]


@mistake("`predict` without a file to write")
def _(place: Place) -> list[str]:
    return predict(place)


@mistake("a file to write that is there already")
def _(place: Place) -> list[str]:
    (place.folder / "labels.parquet").write_text("precious")
    return predict(place, "out=labels.parquet")


@mistake("another format to write")
def _(place: Place) -> list[str]:
    return predict(place, "out=labels.csv")


@mistake("another network than the run's")
def _(place: Place) -> list[str]:
    return predict(place, "out=labels.parquet", "teacher.width=8")


@mistake("rows of another size than the network's")
def _(place: Place) -> list[str]:
    pixels = pa.array([[[0] * 6] * 6] * 3, pa.list_(pa.list_(pa.uint8())))
    pq.write_table(pa.table({"image": pixels}), place.folder / "new.parquet")
    return predict(place, "out=labels.parquet", "data=parquet", "data.path=new.parquet")
