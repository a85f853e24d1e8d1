"""What a search is compared with: the same trials as Ray's documentation has them, a TorchTrainer for each.

    python -m tests.bench.search_baseline --data DIR --checkpoint FILE --trials 16 --epochs 10

Every trial asks the teacher inline. Prints one line of JSON: seconds that each trial trained.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of write_images")
    parser.add_argument("--checkpoint", required=True, help="the teacher's weights")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student-width", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--trials", type=int, required=True)
    parser.add_argument("--concurrent", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    arguments = parser.parse_args()

    import ray
    from ray import tune

    # One CPU for each worker, and one between the functions that wait for them.
    ray.init(address="local", num_cpus=arguments.concurrent + 1, logging_level=logging.WARNING, log_to_driver=False)
    space = vars(arguments) | {"temperature": tune.loguniform(1, 16), "kd_weight": tune.uniform(0.1, 2)}
    with tempfile.TemporaryDirectory(prefix="bench-") as storage:
        space["storage"] = storage
        tuner = tune.Tuner(
            tune.with_resources(drive_trial, {"CPU": 1 / arguments.concurrent}),
            param_space=space,
            tune_config=tune.TuneConfig(num_samples=arguments.trials, max_concurrent_trials=arguments.concurrent),
            run_config=tune.RunConfig(storage_path=storage, name="search", verbose=0),
        )
        results = tuner.fit()
        seconds = [result.metrics["train_s"] for result in results]
    print(json.dumps({"train_s": seconds}), flush=True)


def drive_trial(config: dict[str, Any]) -> None:
    import ray.tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    trainer = TorchTrainer(
        train_one,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            name=f"trial-{ray.tune.get_context().get_trial_id()}",
            storage_path=config["storage"],
            callbacks=[TuneReportCallback()],
        ),
    )
    trainer.fit()


def train_one(config: dict[str, Any]) -> None:
    """The plain loop of ``tests.bench.plain_loop``, to its end."""
    import ray.train
    import torch
    from torch.utils.data import DataLoader

    from pipeline.contracts.columns import INPUT, LABEL
    from pipeline.data import AugmentParams
    from pipeline.data.sources.parquet import ParquetParams
    from pipeline.losses.kd import kl_divergence
    from pipeline.models import MODELS, build_classifier, load_weights
    from tests.bench.plain_loop import Blocks

    torch.set_num_threads(1)
    torch.manual_seed(0)
    params = ParquetParams(path=config["data"], augment=AugmentParams(crop_padding=4, flip=True))
    source, entries = params.open(), MODELS.entries()
    teacher = build_classifier(entries[config["teacher"]].model_validate({"name": config["teacher"]}), source.spec)
    load_weights(teacher.network, config["checkpoint"])
    teacher.eval().requires_grad_(False)
    values = {"name": "small_cnn", "width": config["student_width"]}
    student = build_classifier(entries["small_cnn"].model_validate(values), source.spec).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    batches = iter(DataLoader(Blocks(params, config["batch_size"]), batch_size=None))
    steps = source.split("train").num_rows // config["batch_size"]
    began = time.perf_counter()
    for epoch in range(config["epochs"]):
        for _ in range(steps):
            batch = next(batches)
            with torch.inference_mode():
                logits = teacher(batch[INPUT])
            student_logits = student(batch[INPUT])
            kd = kl_divergence(student_logits, logits.clone(), temperature=config["temperature"])
            loss = config["kd_weight"] * kd + 0.1 * torch.nn.functional.cross_entropy(student_logits, batch[LABEL])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            loss.item()  # a user would log it
        ray.train.report({"epoch": epoch + 1, "train_s": time.perf_counter() - began})


if __name__ == "__main__":
    main()
