"""Population-based training: at each pause of a search the worst trials give way to changed copies of the best."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config.results import write_json
from pipeline.config.stored import read_json
from pipeline.search import Axis, Branch, Draw, Number, RandomChooser, Space, Value
from pipeline.training.context import find_local
from pipeline.training.state import explain_writing, forget_best
from pipeline.trials.records import Trial, trial_folder

_SHARE = 0.25  # of the population, at either end
_DRAWN_ANEW = 0.25  # of the values of a copy
_FACTORS = (0.8, 1.2)
_NUM_INTERVALS = 9  # between the pauses of a trial
_FILE = Path("search", "population.json")
_COPIES = Path("search", "copies")


@dataclass(frozen=True)
class Copy:
    """A trial that takes another's place.

    Attributes:
        label: its own.
        replaced: the trial that ends for it.
        source: the trial whose weights it begins with.
    """

    label: str
    replaced: str
    source: str
    draw: Draw


class Population:
    """Population-based training (Jaderberg et al., 2017), all trials in step with each other.

    Trials pause after each ninth of the epochs, at least one. When all have, the worst quarter by their latest values
    ends; in the place of each a new trial goes on from the checkpoint of one of the best quarter, with its values times
    0.8 or 1.2 (of a choice: the option before or after), or, one in four, drawn anew. Shares, factors and odds are the
    defaults of Ray's scheduler; the paper leaves them to the task. What was decided is written down before anything of
    it is done, so that a search that is killed decides nothing twice.

    Args:
        run_dir: of the search.
        num_epochs: of a whole trial.
        maximise: whether more of the metric is better.
        seed: of all choices.
    """

    def __init__(self, run_dir: Path, space: Space, num_epochs: int, maximise: bool, seed: int) -> None:
        self._run_dir, self._space, self._num_epochs = run_dir, space, num_epochs
        self._maximise, self._seed = maximise, seed
        self._interval = max(1, num_epochs // _NUM_INTERVALS)
        path = run_dir / _FILE
        decided: dict[str, Any] = read_json(path) if path.exists() else {"epoch": 0, "copies": []}
        self._epoch: int = decided["epoch"]  # of the last pause
        self._copies = [Copy(**values) for values in decided["copies"]]

    def pauses(self, epoch: int) -> bool:
        """Whether a trial that has come so far waits for the others."""
        return self._epoch + self._interval <= epoch < self._num_epochs

    def evolve(self, trials: Mapping[str, Trial]) -> None:
        """Decides which trials give way; ``settle`` carries it out.

        Args:
            trials: by label; those of the search that are not over are paused.

        Raises:
            CheckpointError: a checkpoint cannot be copied, perhaps because the disk is full; nothing is decided then.
        """
        own = [trial for trial in trials.values() if not trial.confirms]
        ranked = sorted((trial for trial in own if not trial.is_over), key=self._rank)
        number = min(math.ceil(_SHARE * len(ranked)), len(ranked) // 2)
        epoch = max(trial.curve[-1][0] for trial in ranked)
        chance = random.Random(f"{self._seed} {epoch}")
        copies = list(self._copies)
        for label, replaced in enumerate(ranked[len(ranked) - number :], start=len(own)):
            source = chance.choice(ranked[:number])
            draw = self._space.draw(_Changer(source.draw or {}, chance))
            copy = Copy(f"{label:04d}", replaced.label, source.label, draw)
            self._keep_checkpoint(copy)
            copies.append(copy)
        path = self._run_dir / _FILE
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"epoch": epoch, "copies": [asdict(copy) for copy in copies]})
        self._epoch, self._copies = epoch, copies

    def settle(self, trials: dict[str, Trial]) -> list[Trial]:
        """Puts into ``trials`` what was decided.

        Returns:
            those that gave way now.
        """
        ended = []
        for copy in self._copies:
            replaced = trials[copy.replaced]
            if not replaced.is_over:
                value = replaced.best_value(self._maximise)
                message = f"gave way to {copy.label}, a copy of {copy.source}"
                ended.append(replace(replaced, state="pruned", value=value, message=message))
                trials[copy.replaced] = ended[-1]
            trials.setdefault(copy.label, Trial(copy.label, copy.draw, copy_of=copy.source))
        return ended

    def forget(self, trial: Trial) -> None:
        """What a copy began with, now that it is over; one that failed may be tried again."""
        if trial.copy_of and trial.state != "failed":
            shutil.rmtree(checkpoint_of_copy(self._run_dir, trial.label), ignore_errors=True)

    def _rank(self, trial: Trial) -> tuple[bool, float, str]:
        value = trial.curve[-1][1]
        return not math.isfinite(value), -value if self._maximise else value, trial.label

    def _keep_checkpoint(self, copy: Copy) -> None:
        """The source goes on, and its checkpoint with it."""
        folder = checkpoint_of_copy(self._run_dir, copy.label)
        found = find_local(trial_folder(self._run_dir, copy.source) / "checkpoints")
        assert found is not None  # it was evaluated, which leaves one
        shutil.rmtree(folder, ignore_errors=True)
        with explain_writing(folder):
            shutil.copytree(found, folder)
            forget_best(folder)  # with other values it came to what it was


def checkpoint_of_copy(run_dir: Path, label: str) -> Path:
    """The checkpoint that a copy begins with."""
    return run_dir / _COPIES / label


class _Changer:
    """Chooses what lies near the values of another trial, and of one in four values any."""

    def __init__(self, draw: Draw, chance: random.Random) -> None:
        self._draw, self._chance = draw, chance
        self._anew = RandomChooser(chance.randrange(2**31))

    def choose(self, axis: Axis) -> Value:
        value = self._draw[axis.name]
        if isinstance(axis, Branch):  # its axes are those of this option
            return value
        if self._chance.random() < _DRAWN_ANEW:
            return self._anew.choose(axis)
        if isinstance(axis, Number):
            return axis.nearest(float(value) * self._chance.choice(_FACTORS))
        place = axis.options.index(value) + self._chance.choice((-1, 1))
        return axis.options[min(max(place, 0), len(axis.options) - 1)]
