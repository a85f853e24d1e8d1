"""Errors a user can meet. Each message is one sentence: what, where, got, expected, and what to do."""

from __future__ import annotations

from typing import Any, ClassVar


class PipelineError(Exception):
    """Base of every error that is reported without a traceback on the command line.

    Args:
        message: the whole sentence shown to the user.
        details: JSON-serialisable facts for ``result.json`` and for programs that catch the error.

    Attributes:
        passes: whether the same may go well another time, from the last checkpoint: neither the configuration nor the
            data is the cause.
    """

    passes: ClassVar[bool] = False

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray ships errors between processes; the default reduction would lose the keyword arguments.
        return (_rebuild, (type(self), self.message, self.details))


def _rebuild(cls: type[PipelineError], message: str, details: dict[str, Any]) -> PipelineError:
    return cls(message, **details)


class ConfigError(PipelineError):
    """The configuration is wrong: an unknown key, a bad value, a combination that cannot work."""


class DataError(PipelineError):
    """Data is missing, unreadable or not what the configuration says."""


class CheckpointError(PipelineError):
    """A checkpoint is missing, damaged, or of another architecture."""


class ModelError(PipelineError):
    """A network cannot be built, or returns something that is not logits of the expected shape."""


class CacheError(PipelineError):
    """A cache of teacher logits is missing, stale, damaged, or cannot be written."""


class ResourceError(PipelineError):
    """The cluster cannot hold what the run needs."""


class RunError(PipelineError):
    """A run folder cannot be used: another configuration, not writable, or in use."""


class TrackingError(PipelineError):
    """The tracking server cannot be reached or refused the request."""


class StorageError(PipelineError):
    """A storage service did not answer for minutes, or could not be reached."""

    passes = True


class StreamError(PipelineError):
    """A worker received another block than the one its position calls for."""

    passes = True


class NonFiniteError(PipelineError):
    """A loss or gradient became NaN or infinite; raised before the optimizer step."""


class TrainingError(PipelineError):
    """Training failed for a reason that is not the user's configuration."""
