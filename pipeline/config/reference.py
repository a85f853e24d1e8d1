"""``conf/README.md``, every group and key for people who look one up: ``make reference`` writes it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence

from pipeline.config.keys import Choice, Key, choices_of, code, keys_of, show
from pipeline.config.schema import config_class, get_path

COMMAND = "make reference"
_LONGEST_VALUE = 30  # of a value in a cell that a choice sets; its file is shown below anyhow
_ABOUT = {
    "run": "Where a run is kept, its name in the tracker, and its seed.",
    "data": "The data set, its splits, and how training images are augmented.",
    "teacher": "The network that teaches: its weights, where its logits come from, and the actors that compute them.",
    "student": "The network that learns.",
    "loss": "What the student learns from.",
    "train": "Training: epochs, batch size, optimizer, learning-rate schedule and warm-up, precision, checkpoints.",
    "evaluation": "How a network is evaluated.",
    "selection": "How PTLoss's coefficients are selected, by `select-perturbation` or `loss.perturbation_from=auto`.",
    "cache": "The cache of the teacher's logits: where it is, and what it keeps of a row.",
    "search": "What a search varies, how it chooses, and when it stops.",
    "cluster": "How and on what a run is carried out; never what it computes.",
    "tracking": "MLflow: the server, the experiment, and whether a run needs it.",
    "experiment": "Choices and keys of several groups under one name. It has no keys of its own.",
}
_HEAD = f"""\
# Configuration: every group and key

`{COMMAND}` writes this file from the parameter models and the files of this folder. To change a meaning, change the
docstring below the key in its model.

## How a configuration is put together

* A group is a part of the configuration, such as `data` or `loss`. A choice is a file of its folder:
  `loss=cmkd` takes `conf/loss/cmkd.yaml`. What you do not choose is as `conf/config.yaml` says.
* `loss=FILE.yaml` takes a file that lies elsewhere. `--conf DIR` adds a folder that is laid out like this one and goes
  before it: `DIR/loss/mine.yaml` is `loss=mine`. It may be repeated.
* `train.optimizer.lr=0.05` sets a key, whatever the chosen files say; the last one wins. A list is `[1,2]`, a mapping
  `{{a: 1}}` (quote both for the shell), none is `null`. A key never changes its type.
* `experiment=NAME` chooses and sets several things at once; what you give beside it wins.
* `train.epochs=+5` and `search.num_trials=+16` add to what a run has, with `resume=RUN`.
* `train-teacher` begins with `loss=cross_entropy`; `search` with `teacher.source=cached cache.path=runs/cache`.
* `resume=`, `run=`, `out=` and the like belong to commands: `python -m pipeline COMMAND --help` has them.

`validate` prints every key with the value that it comes to, and starts nothing:

```bash
python -m pipeline validate experiment=digits_demo teacher.checkpoint=runs/demo-teacher
python -m pipeline validate train=cifar train.optimizer.schedule=cosine train.optimizer.warmup_epochs=5 \\
    loss=cross_entropy
```

In the tables, a default is that of the model; behind it stands what a choice sets instead. KEY stands for a name.

## Groups"""


def render() -> str:
    """The whole text."""
    groups = [*config_class().model_fields, "experiment"]
    choices = {group: choices_of(group) for group in groups}
    every = [choice for group in groups for choice in choices[group]]
    contents, sections = [], []
    for group in groups:
        keys = keys_of(group) if group in config_class().model_fields else {}
        own = dict(_own_sections(keys, choices[group], every))
        links = ", ".join(f"[{label.partition('=')[2]}](#{label.replace('=', '')})" for label in own)
        contents.append(f"* [{group}](#{group}): {_ABOUT[group]}{f' More on {links}.' if own else ''}")
        sections += [f"## {group}", _ABOUT[group]]
        if choices[group]:
            rows = [(code(choice.label), choice.about) for choice in choices[group]]
            sections.append(_table(("choice", "what it is"), rows))
        if keys:
            sections.append(_key_table(keys[""], every))
        for label, text in own.items():
            sections += [f"### {label}", text]
    return "\n\n".join([_HEAD, "\n".join(contents), *sections]) + "\n"


def _own_sections(
    keys: dict[str, list[Key]], choices: Sequence[Choice], every: Sequence[Choice]
) -> Iterator[tuple[str, str]]:
    """Label and text of the choices that have keys of their own, or set values."""
    for choice in choices:
        own = keys.get(choice.label.partition("=")[2])
        texts = [_key_table(own, every)] if own else []
        if choice.values:
            texts.append(f"It sets:\n\n```yaml\n{choice.text}\n```")
        if texts:
            yield choice.label, "\n\n".join(texts)


def _key_table(keys: Sequence[Key], choices: Sequence[Choice]) -> str:
    rows = []
    for key in keys:
        given = {choice.label: get_path(choice.values, key.path, ...) for choice in choices}
        shown = {label: show(value) for label, value in given.items() if value is not ...}
        notes = [
            f"{code(label)}: {value}"
            for label, value in shown.items()
            if value != key.default and key.default != "as below" and len(value) <= _LONGEST_VALUE
        ]
        rows.append((code(key.path), key.type, "; ".join((key.default, *notes)), key.meaning))
    return _table(("key", "type", "default", "meaning"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(text: str) -> str:
    """Keeps what is no code from being read as HTML or emphasis, and a bar from ending its cell."""
    parts = text.split("`")
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(r"[\\*]|<(?=\w)", r"\\\g<0>", parts[index])
    return "`".join(parts).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(render())
