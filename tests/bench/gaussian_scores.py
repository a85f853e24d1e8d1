"""Whether the score by one-hot labels ranks coefficients as the distance to the truth does, where the truth is known.

    python -m tests.bench.gaussian_scores

Teachers on a mixture of Gaussians (the generator of arXiv 2203.02485), trained for few to many epochs, and made sharper
or softer. Every candidate is scored by the labels of 2,000 validation rows, and its proxy teacher's distance to the
true class probabilities is measured on 2,000 others. Replaces its part of tests/bench/RESULTS.md; two minutes on one
core.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from pipeline.evaluation.perturbation_candidates import draw_candidates, score_rows
from pipeline.evaluation.perturbation_selection import select_perturbation
from pipeline.evaluation.proxy_teacher import log_probabilities, proxy_teacher
from pipeline.evaluation.selection import SelectionParams
from tests.bench.measure import say, table, write_section

NUM_FEATURES, VARIANCE = 30, 6.0
NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 5_000, 2_000, 2_000
NUM_CLASSES = (3, 10)
EPOCHS = (1, 5, 40)
TEMPERATURES = (0.5, 1.0, 2.0)  # that the teacher's logits are divided by: sharper, as trained, softer


def main() -> None:
    rows, correlations = [], []
    for num_classes in NUM_CLASSES:
        features, labels, true = _draw(num_classes)
        for epochs in EPOCHS:
            with say(f"{num_classes} classes, {epochs} epochs"):
                logits = _train(features, labels, num_classes, epochs)
                for temperature in TEMPERATURES:
                    row, found = _compare(logits / temperature, labels[NUM_TRAIN:], true[NUM_TRAIN:])
                    rows.append([num_classes, epochs, temperature, *row])
                    correlations.append(found)
    squared, norm = np.array(correlations).T
    columns = (
        "classes", "epochs", "logits /", "squared score", "norm score", "teacher", "temperature-scaled", "selected",
        "selected by norm", "best of all",
    )  # fmt: skip
    write_section(
        "gaussian_scores",
        "\n\n".join(
            [
                "Teachers: MLP 30-128-128-C on 5,000 rows, SGD, batches of 32. Left: Spearman's correlation, over the "
                "256 candidates for shared coefficients, of the mean score by the labels of 2,000 validation rows with "
                "the mean L2 distance of the proxy teacher to the true class probabilities on 2,000 others. Right: "
                "that distance of the teacher, of the temperature-scaled teacher, of the proxy teacher that is "
                "selected by the squared and by the plain norm, and of the candidate that is best by the truth itself.",
                table(columns, rows),
                f"Median correlation: squared {np.median(squared):.3f} (lowest {squared.min():.3f}), "
                f"norm {np.median(norm):.3f} (lowest {norm.min():.3f}).",
            ]
        ),
    )


def _draw(num_classes: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Features, labels, and the true probabilities of the classes of every row."""
    generator = np.random.default_rng(1029)
    means = generator.integers(-1, 2, size=(num_classes, NUM_FEATURES)).astype(np.float64)
    labels = generator.integers(num_classes, size=NUM_TRAIN + NUM_VALIDATION + NUM_TEST)
    features = means[labels] + np.sqrt(VARIANCE) * generator.normal(size=(len(labels), NUM_FEATURES))
    scores = (features @ means.T - (means**2).sum(axis=1) / 2) / VARIANCE
    return torch.from_numpy(features).float(), labels, np.exp(log_probabilities(scores))


def _train(features: torch.Tensor, labels: np.ndarray, num_classes: int, epochs: int) -> np.ndarray:
    """Logits of a teacher on all rows that it was not trained on."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(NUM_FEATURES, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, num_classes)
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    targets = torch.from_numpy(labels[:NUM_TRAIN])
    for _ in range(epochs):
        for rows in torch.randperm(NUM_TRAIN).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(features[rows]), targets[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        return network(features[NUM_TRAIN:]).double().numpy()


def _compare(logits: np.ndarray, labels: np.ndarray, true: np.ndarray) -> tuple[list[str], list[float]]:
    """The cells of a row; and the correlations of both scores with the true distance."""
    validation, test = slice(0, NUM_VALIDATION), slice(NUM_VALIDATION, None)

    def distance(log_q: np.ndarray) -> float:
        return float(np.linalg.norm(np.exp(log_q) - true[test], axis=1).mean())

    candidates = draw_candidates(5, 256, upper=5.0, seed=0)
    distances = [distance(proxy_teacher(logits[test], candidate)) for candidate in candidates]
    proxies = [proxy_teacher(logits[validation], candidate) for candidate in candidates]
    correlations = [
        float(
            spearmanr([score_rows(log_q, labels[validation], score).mean() for log_q in proxies], distances).statistic
        )
        for score in ("squared", "norm")
    ]
    found = [
        select_perturbation(logits[validation], labels[validation], SelectionParams(score=score))
        for score in ("squared", "norm")
    ]
    selected = [
        distance(proxy_teacher(logits[test], np.array(selection.perturbation.coefficients[0]))) for selection in found
    ]
    scaled = distance(log_probabilities(logits[test] / found[0].scaling_temperature))
    cells = [distances[0], scaled, *selected, min(distances)]
    return [*(f"{value:.3f}" for value in correlations), *(f"{value:.4f}" for value in cells)], correlations


if __name__ == "__main__":
    main()
