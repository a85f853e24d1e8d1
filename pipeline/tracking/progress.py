"""How much of a run's journal the tracking server has: ``tracking.json`` in the run folder."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pipeline.errors import TrackingError

FILE_NAME = "tracking.json"


@dataclass
class Progress:
    """The state of the sender, stored after every batch.

    Attributes:
        uri: the server all of this is about, without credentials.
        run_id: MLflow's id of the run; None until it was created.
        offset: bytes of the journal that were sent.
        step: highest optimizer step seen; system samples are shown at it.
        sent_steps: metric to the highest step sent for it.
        run_key: a tag of the run, by which it is found again if creating it succeeded but the answer was lost.
    """

    uri: str
    run_id: str | None = None
    offset: int = 0
    step: int = 0
    sent_steps: dict[str, int] = field(default_factory=dict)
    run_key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def copy(self) -> Progress:
        return replace(self, sent_steps=dict(self.sent_steps))

    def save(self, folder: Path) -> None:
        path = folder / FILE_NAME
        temporary = path.with_name(f".{FILE_NAME}.tmp")
        temporary.write_text(json.dumps(asdict(self)), encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def load(cls, folder: Path, uri: str) -> Progress:
        """What was stored for ``uri``; a fresh start where there is nothing, or another server was used.

        Raises:
            TrackingError: the file is not what ``save`` writes.
        """
        path = folder / FILE_NAME
        if not path.exists():
            return cls(uri)
        try:
            stored = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise TrackingError(
                f"{path} is damaged ({error}). Delete it to send the run's whole record to a new MLflow run."
            ) from None
        # The journal is the truth: another server gets all of it.
        return stored if stored.uri == uri else cls(uri)
