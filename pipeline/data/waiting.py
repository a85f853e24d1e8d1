"""Storage services that do not answer: asked again for minutes, and not in silence."""

from __future__ import annotations

import contextlib
import errno
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.contracts.events import Emitter, Event
from pipeline.errors import StorageError

T = TypeVar("T")

# What the AWS library says of a service that is there but not able, and of one that cannot be reached. A certificate
# that is not trusted (curl's 60 and 77) is for the user to mend.
_UNABLE = re.compile(
    r"AWS Error (?:(SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|THROTTLING|REQUEST_TIMEOUT)"
    r"|\w+ \(HTTP status (429|5(?!01)\d\d)\))"
)
_UNREACHABLE = re.compile(r"AWS Error NETWORK_CONNECTION(?!.*curlCode: (?:60|77)\b)(?:.*curlCode: \d+, ([^;]+))?")
_NETWORK = frozenset(
    (errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
)


@dataclass(frozen=True)
class Patience:
    """How long a service is waited for, and how that passes.

    Attributes:
        total_s: from the first failure until it is given up. Less than the ten minutes for which workers wait for each
            other over NCCL.
        start_s: of one that cannot be reached and never could, before a run: its address may be wrong. A failure that
            took longer to show, as where nothing answers at all, is the last.
        first_s: of the first pause between two attempts. Each is up to twice as long as the one before, and between
            half and all of that by chance, so that many processes do not come back at the same moment.
        longest_s: of a pause.
        tell_after_s: from when on there is a line about it.
        tell_every_s: between two lines of a process about one service.
    """

    total_s: float = 300.0
    start_s: float = 20.0
    first_s: float = 0.5
    longest_s: float = 15.0
    tell_after_s: float = 5.0
    tell_every_s: float = 30.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


PATIENCE = Patience()

_MOMENT_S = 0.01  # no time to try once more
_known: set[Hashable] = set()  # services that this process has had an answer from
_chance = random.Random()  # of its own: the shared generator is seeded by those who count on its numbers


def ask_storage(filesystem: pafs.FileSystem, path: str, action: Callable[[], T]) -> T:
    """What ``action`` returns, which is called again as long as the storage service does not answer.

    Args:
        filesystem: that ``action`` uses; one of this machine is asked once.
        path: within it, for messages.
        action: reads, or writes a whole object: nothing may be left of a call that failed.

    Raises:
        StorageError: the service was not available for ``PATIENCE.total_s``.
        OSError, ArrowException: anything else, at once; and a service that could not be reached from the beginning.
    """
    if isinstance(filesystem, pafs.LocalFileSystem):
        return action()
    service = getattr(filesystem, "address", filesystem.type_name)
    return ask_service(service, f"{filesystem.type_name}://{path}", action)


def ask_service(service: Hashable, place: str, action: Callable[[], T]) -> T:
    """As ``ask_storage``.

    Args:
        service: what is the same for all that one service holds.
        place: a URI, for messages.
    """
    wait = _Wait(service, place)
    while True:
        try:
            answer = action()
        except Exception as error:
            problem = _find_problem(error)
            if problem is None:
                wait.end()
                raise
            wait.prolong(problem, error)
        else:
            wait.end()
            return answer


class _Problem(NamedTuple):
    """What a service does instead of answering; ``reachable``: it did say something."""

    text: str
    reachable: bool


def _find_problem(error: BaseException) -> _Problem | None:
    """None where the error is an answer: a refusal, or that nothing is there."""
    if not isinstance(error, (OSError, pa.ArrowException)):
        return None
    text = str(error)
    if found := _UNABLE.search(text):
        return _Problem(f"answered {found[1] or found[2]}", reachable=True)
    if found := _UNREACHABLE.search(text):
        return _Problem(f"unreachable ({(found[1] or 'no connection').strip()})", reachable=False)
    if isinstance(error, OSError) and error.errno in _NETWORK:
        return _Problem(f"unreachable ({text.splitlines()[0]})", reachable=False)
    return None


class _Wait:
    """One call's wait for a service."""

    def __init__(self, service: Hashable, place: str) -> None:
        self._service, self._place = service, place
        self._asked = PATIENCE.clock()
        self._began: float | None = None
        self._pause_s = PATIENCE.first_s

    def prolong(self, problem: _Problem, error: Exception) -> None:
        """Waits for the time of a pause, or gives up."""
        now = PATIENCE.clock()
        self._began = now if self._began is None else self._began
        waited_s = now - self._began
        if problem.reachable:
            _known.add(self._service)
        known = self._service in _known or _told.under_way
        left_s = PATIENCE.total_s - waited_s if known else PATIENCE.start_s - (now - self._asked)
        if left_s < _MOMENT_S and not known:
            raise error
        if left_s < _MOMENT_S:
            raise StorageError(
                f"{self._place}: the storage service was not available for {waited_s:.0f} s ({problem.text}); once it "
                "is, go on with resume=RUN, or give the command again where no run had begun: what was saved is whole."
            ) from error
        _told.tell(self._service, self._place, problem, waited_s, left_s)
        PATIENCE.sleep(min(self._pause_s * _chance.uniform(0.5, 1.0), left_s))
        self._pause_s = min(2 * self._pause_s, PATIENCE.longest_s)

    def end(self) -> None:
        """There was an answer."""
        _known.add(self._service)
        if self._began is not None:
            _told.end(self._service, self._place, PATIENCE.clock() - self._began)


class WaitsOnConsole:
    """Writes what is waited for to stderr, and nothing else; see ``Emitter``."""

    def emit(self, event: Event) -> None:
        if event.kind == "wait":
            sys.stderr.write(f"{event.data['message']}\n")
            sys.stderr.flush()


class _Told:
    """What is told of this process's waits: by all its threads together, and not too often."""

    def __init__(self) -> None:
        self.emitter: Emitter = WaitsOnConsole()
        self.under_way = False
        self._times: dict[Hashable, float] = {}
        self._lock = threading.Lock()

    def tell(self, service: Hashable, place: str, problem: _Problem, waited_s: float, left_s: float) -> None:
        now = PATIENCE.clock()
        with self._lock:
            last = self._times.get(service)
            if waited_s < PATIENCE.tell_after_s or (last is not None and now - last < PATIENCE.tell_every_s):
                return
            self._times[service] = now
        bucket = _bucket(place)
        left = f"trying again for up to {left_s:.0f} s"
        self._emit(bucket, True, f"waiting for {bucket}: {problem.text} for {waited_s:.0f} s, {left}")

    def end(self, service: Hashable, place: str, waited_s: float) -> None:
        with self._lock:
            if self._times.pop(service, None) is None:
                return
        bucket = _bucket(place)
        self._emit(bucket, False, f"{bucket} answers again after {waited_s:.0f} s")

    def _emit(self, name: str, waiting: bool, message: str) -> None:
        with contextlib.suppress(OSError):  # a journal on a full disk is no matter of the storage service
            self.emitter.emit(Event("wait", {"name": name, "waiting": waiting, "message": message}))


_told = _Told()


def tell_waits(emitter: Emitter | None) -> None:
    """From now on this process tells ``emitter`` what it waits for, and gives no service up early; none: as at first.

    For the time of a run, and in each process that works for one.
    """
    _told.emitter = WaitsOnConsole() if emitter is None else emitter
    _told.under_way = emitter is not None


def _bucket(place: str) -> str:
    scheme, _, path = place.partition("://")
    return f"{scheme}://{path.partition('/')[0]}"
