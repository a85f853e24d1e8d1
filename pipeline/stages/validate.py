"""``validate``: what a configuration amounts to, without starting anything."""

from __future__ import annotations

import yaml

from pipeline.config.load import load_config
from pipeline.config.request import Request
from pipeline.config.runs import settle
from pipeline.config.stored import hash_config
from pipeline.contracts.columns import SPLITS, SplitName
from pipeline.data import DataSource
from pipeline.execution.ways import preflight_rows
from pipeline.execution.work import check_labels
from pipeline.models import build_classifier, load_initial_weights, load_teacher_weights
from pipeline.report.tables import render_table
from pipeline.training import make_plan, make_planner, open_test, open_training


def validate(request: Request) -> int:
    """Prints the resolved configuration, the data, the networks and who needs what; returns 0.

    Raises:
        PipelineError: whatever ``distill`` would find before it began.
    """
    config = settle(load_config(request).config)
    source = config.data.open()
    print(yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True).rstrip())
    print(f"\nconfig hash {hash_config(config)}\n")

    readers = {
        name: open_test(source, "its rows are counted, none is read") if name == "test" else source.split(name)
        for name in SPLITS
    }
    splits = [
        (name, reader.num_rows, _count_unlabelled(source, name), source.carved.get(name, "files of its own"))
        for name, reader in readers.items()
    ]
    print(render_table("data", ("split", "rows", "without label", "from"), splits))
    spec = source.spec
    print(f"{spec.kind} {tuple(spec.shape)}, {spec.num_classes} classes, fingerprint {source.fingerprint}\n")

    check_labels(config, source)

    rows: list[tuple[object, ...]] = []
    for role in ("teacher", "student"):
        params = getattr(config, role)
        if role == "teacher" and not config.loss.needs_teacher:
            continue
        classifier = build_classifier(params, source.spec)
        if role == "teacher":
            weights = load_teacher_weights(classifier, params)
        else:
            weights = load_initial_weights(classifier, params, role=role)
        count = sum(parameter.numel() for parameter in classifier.network.parameters())
        rows.append((role, params.name, count, weights))
    print(render_table("networks", ("role", "name", "parameters", "weights"), rows))

    plan = make_plan(make_planner(config.data, open_training(source), config.train, config.run.seed), config.train)
    print(
        f"{plan.num_epochs} epochs of {plan.blocks_per_epoch} blocks of {plan.batch_size} rows, "
        f"{plan.blocks_per_step} blocks a step: {plan.num_steps} steps\n"
    )
    print(render_table("preflight", ("who", "how many", "each", "in all"), preflight_rows(config, request.command)))
    print("ok: nothing was started")
    return 0


def _count_unlabelled(source: DataSource, split: SplitName) -> int:
    return source.unlabelled[split].num_rows if split in source.unlabelled else 0
