"""The process that makes checks, so that one which hangs or crashes ends that process and nothing else."""

from __future__ import annotations

import gc
import multiprocessing
import os
import platform
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from tests.gpu.registry import MODULES, Check, Figures, Place, Skipped, all_checks, call

State = Literal["ok", "failed", "skipped", "not reached"]

_START_S = 120.0  # to import torch and to find the GPU
_END_S = 10.0
_TAIL = 4_000  # characters of a log that are kept with a failure


@dataclass(frozen=True)
class Outcome:
    """What became of a check.

    Attributes:
        reason: why it failed or was not made, in one line.
        detail: of a failure: its traceback, and the ends of the logs that it left.
    """

    state: State
    seconds: float = 0.0
    figures: Figures = field(default_factory=dict)
    reason: str = ""
    detail: str = ""


class Worker:
    """Makes checks in a process, which is replaced once a check has failed in it.

    Args:
        device: ``cuda`` or ``cpu``.
        folder: for what the checks write.
        modules: whose checks it lists when it is first started.

    Attributes:
        machine: what it found here.
        checks: of ``modules``.
    """

    def __init__(self, device: str, folder: Path, modules: tuple[str, ...] = MODULES) -> None:
        self._device, self._folder, self._modules = device, folder, modules
        self._process: Any = None
        self._connection: Connection | None = None
        self._is_idle = True
        self.machine: dict[str, Any] = {}
        self.checks: list[Check] = []

    def start(self) -> None:
        """Starts the process where none runs, and notes what it says of the machine and which checks there are.

        Raises:
            RuntimeError: it cannot import torch, or takes too long for that.
        """
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._folder.mkdir(parents=True, exist_ok=True)
        log = self._folder / f"worker-{time.monotonic_ns()}.log"
        arguments = (other, self._device, str(log), () if self.checks else self._modules)
        self._process = context.Process(target=_serve, args=arguments, name="checks")
        self._process.start()
        other.close()
        answer = self._receive(_START_S)
        if not isinstance(answer, tuple):
            self.end()
            raise RuntimeError(f"the process that makes the checks does not start: {answer}")
        self.machine, checks = answer
        self.checks = self.checks or checks

    def make(self, check: Check, limit_s: float) -> Outcome:
        """Makes a check, for at most ``limit_s``."""
        began = time.monotonic()
        folder = self._folder / check.name
        try:
            self.start()
        except RuntimeError as error:
            return Outcome("failed", time.monotonic() - began, reason=str(error))
        folder.mkdir(parents=True, exist_ok=True)
        assert self._connection is not None
        self._connection.send((check, Place(self._device, folder, self._folder / "shared")))
        answer = self._receive(limit_s)
        seconds = time.monotonic() - began
        if isinstance(answer, Outcome):
            outcome = Outcome(answer.state, seconds, answer.figures, answer.reason, answer.detail)
        else:
            outcome = Outcome("failed", seconds, reason=str(answer))
        if outcome.state == "failed":  # after an error of CUDA nothing else works in that process
            self.end()
            logs = "".join(_tail(path) for path in sorted(folder.rglob("*.log")))
            outcome = Outcome("failed", seconds, outcome.figures, outcome.reason, outcome.detail + logs)
        return outcome

    def end(self) -> None:
        """Ends the process, and all in its group."""
        if self._process is None:
            return
        process, self._process = self._process, None
        if self._connection is not None:
            with suppress(OSError):
                self._connection.send(None)
            process.join(_END_S if process.is_alive() and self._is_idle else 0)
            self._connection.close()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # it may not have made its group yet
        process.join()

    def _receive(self, limit_s: float) -> Any:
        """What the process says within ``limit_s``, or a sentence about why it says nothing."""
        assert self._connection is not None
        self._is_idle = False
        if not self._connection.poll(limit_s):
            return f"took longer than {limit_s:.0f} s and was killed"
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join(_END_S)
            code = self._process.exitcode
            return (
                f"its process was ended by {signal.Signals(-code).name if code and code < 0 else f'exit code {code}'}"
            )
        self._is_idle = True
        return answer


def _serve(connection: Connection, device: str, log: str, modules: tuple[str, ...]) -> None:
    """Makes the checks that come, one after the other."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    if device == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    connection.send((_describe_machine(device), all_checks(modules)))
    while (order := connection.recv()) is not None:
        connection.send(_make(*order))
        if "torch" in sys.modules:
            _free_memory()


def _make(check: Check, place: Place) -> Outcome:
    try:
        return Outcome("ok", figures=call(check, place))
    except Skipped as skipped:
        return Outcome("skipped", reason=str(skipped))
    except BaseException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        return Outcome("failed", reason=reason[:300], detail=traceback.format_exc()[-_TAIL:])


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _describe_machine(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count()}
    for name in ("torch", "torchvision", "triton", "ray", "mlflow", "mlflow-skinny"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    if device == "cuda":
        import torch

        if torch.cuda.is_available():
            card = torch.cuda.get_device_properties(0)
            found |= {"gpu": card.name, "gpu_gib": round(card.total_memory / 2**30), "cuda": torch.version.cuda}
            found["num_gpus"] = torch.cuda.device_count()
    return found


def _tail(path: Path) -> str:
    text = path.read_text(errors="replace")[-_TAIL:]
    return f"\n--- the end of {path.name}\n{text}" if text.strip() else ""
