"""``python -m tests.gpu``: what a check may do without ending the others, what is written, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.program import carry_out
from tests.gpu.registry import Check, Figures, Place, Skipped, choose
from tests.gpu.worker import Worker

ROOT = Path(__file__).parents[2]


def stub(name: str, limit_s: float = 60.0, *, on_cpu: bool = True) -> Check:
    return Check(name, f"{__name__}:{name.replace('-', '_')}", "a stub", limit_s, on_cpu, on_ray=False)


def works(place: Place) -> Figures:
    return {"rows/s": 12_345.6, "pid": str(os.getpid())}


def raises(place: Place) -> Figures:
    (place.folder / "some.log").write_text("what it said last")
    raise ValueError("a first line\nand a second")


def crashes(place: Place) -> Figures:
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def leaves(place: Place) -> Figures:
    sys.exit(3)


def hangs(place: Place) -> Figures:
    child = subprocess.Popen([sys.executable, "-c", "import signal; print('on', flush=True); signal.pause()"])
    (place.shared.parent / "child").write_text(str(child.pid))
    signal.pause()
    return {}


def is_skipped(place: Place) -> Figures:
    raise Skipped("there is nothing to do")


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    worker = Worker("cpu", tmp_path / "checks", modules=())
    worker.start()
    yield worker
    worker.end()


def make(worker: Worker, checks: list[Check], out: Path, budget_s: float = 100.0) -> tuple[int, dict[str, Any]]:
    code = carry_out(checks, worker, "cpu", time.monotonic() + budget_s, out)
    return code, json.loads(out.read_text())["checks"]


def test_a_check_that_raises_crashes_or_hangs_ends_no_other(
    worker: Worker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["raises", "crashes", "leaves", "is-skipped", "hangs", "works"]
    checks = [stub(name, 2.0 if name == "hangs" else 60.0) for name in names]
    code, found = make(worker, [*checks, stub("is-about-cuda", on_cpu=False)], tmp_path / "runs" / "out.json")
    assert code == 1
    assert {name: found[name]["state"] for name in names} == {
        "works": "ok", "raises": "failed", "crashes": "failed", "leaves": "failed", "is-skipped": "skipped",
        "hangs": "failed",
    }  # fmt: skip
    assert found["raises"]["reason"] == "ValueError: a first line"
    assert "and a second" in found["raises"]["detail"]
    assert "what it said last" in found["raises"]["detail"]
    assert found["crashes"]["reason"] == "its process was ended by SIGSEGV"
    assert found["leaves"]["reason"] == "SystemExit: 3"
    assert found["hangs"]["reason"] == "took longer than 2 s and was killed"
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("works ")
    assert "rows/s 12,346" in lines[-3]
    assert lines[-2].split()[:2] == ["is-about-cuda", "skipped"]
    assert lines[-1].startswith("4 failed, 2 skipped, 1 ok; ")
    child = int((tmp_path / "checks" / "child").read_text())
    assert not is_running(child)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_one_process_makes_checks_until_one_fails(worker: Worker, tmp_path: Path) -> None:
    pids = []
    for name in ("works", "works", "raises", "works"):
        outcome = worker.make(stub(name), 60.0)
        pids.append(outcome.figures.get("pid"))
    assert pids[0] == pids[1] != pids[3]


def test_figures_are_written_after_each_check_and_what_is_not_reached_is_said(worker: Worker, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    code, found = make(worker, [stub("works"), stub("hangs"), stub("raises")], out, budget_s=5.0)
    assert code == 0
    assert {name: one["state"] for name, one in found.items()} == {
        "works": "ok", "hangs": "not reached", "raises": "not reached",
    }  # fmt: skip
    assert [path.name for path in tmp_path.glob("out*")] == ["out.json"]


def test_checks_are_chosen_by_the_beginnings_of_their_names() -> None:
    checks = [stub(name) for name in ("rate-teacher", "rate-student", "losses")]
    assert [one.name for one in choose(checks, ["losses", "rate-t"])] == ["rate-teacher", "losses"]
    assert choose(checks, [""]) == checks
    with pytest.raises(ValueError, match=r"ONLY=rates: no check .* there are rate-teacher, rate-student, losses"):
        choose(checks, ["losses", "rates"])


def program(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "tests.gpu", *arguments], cwd=cwd, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_without_a_gpu_everything_is_skipped(tmp_path: Path) -> None:
    ended = program(cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    *_, last = ended.stdout.splitlines()
    found = json.loads((tmp_path / "runs" / "gpu.json").read_text())["checks"]
    assert {one["state"] for one in found.values()} == {"skipped"}
    assert last.startswith(f"{len(found)} skipped")


@pytest.mark.slow
def test_an_unknown_name_is_a_sentence(tmp_path: Path) -> None:
    ended = program("--only", "losses,ratse", cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.startswith("ONLY=ratse: no check has a name that begins so; there are soft-rank,")
