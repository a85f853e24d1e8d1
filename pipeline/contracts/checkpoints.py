"""The small file in every checkpoint that says where its run stands; read where torch is not wanted."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.errors import CheckpointError

CURSOR_FILE = "cursor.json"


def write_cursor(folder: Path, step: int, blocks_per_step: int) -> None:
    """Writes ``step``, ``blocks_per_step`` and ``cursor``, the blocks consumed."""
    values = {"step": step, "cursor": step * blocks_per_step, "blocks_per_step": blocks_per_step}
    (folder / CURSOR_FILE).write_text(json.dumps(values))


def read_cursor(folder: Path) -> int:
    """Blocks consumed at a checkpoint.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        cursor: int = json.loads((folder / CURSOR_FILE).read_text())["cursor"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"the checkpoint in {folder} has no readable {CURSOR_FILE} ({error}); delete the folder and resume"
        ) from error
    return cursor


def find_furthest(folders: list[Path | None]) -> Path | None:
    """The checkpoint that consumed the most blocks; the first of equals; none where there is none.

    A run may have been carried on under another ``cluster=``, each of which keeps checkpoints of its own.
    """
    present = [folder for folder in folders if folder is not None and folder.exists()]
    if len(present) < 2:
        return present[0] if present else None
    return max(present, key=read_cursor)
