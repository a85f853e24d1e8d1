"""A teacher's logits on a whole split, kept as a file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from pipeline.errors import DataError


def save_logits(path: Path, logits: np.ndarray) -> None:
    """Writes (rows, num_classes) float32 logits in order of sample id, NaN for rows that could not be decoded.

    The file is written whole or not at all.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    with os.fdopen(handle, "wb") as file:
        np.save(file, logits.astype(np.float32), allow_pickle=False)
    os.replace(name, path)


def load_logits(path: Path) -> np.ndarray:
    """Reads what ``save_logits`` wrote.

    Raises:
        DataError: the file is damaged.
    """
    try:
        logits: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"teacher logits in {path} cannot be read ({error}); delete the file and run again") from error
    return logits
