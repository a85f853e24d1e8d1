"""Everything that is chosen when perturbation coefficients are selected, as a function of the rows it is chosen on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.perturbation_candidates import Ranking, rank_candidates
from pipeline.evaluation.perturbation_descent import descend
from pipeline.evaluation.proxy_teacher import log_probabilities, proxy_teacher
from pipeline.evaluation.selection import SelectionParams
from pipeline.evaluation.temperature_scaling import fit_temperature


@dataclass(frozen=True)
class Rows:
    """Rows to choose on, or to try a choice on.

    Attributes:
        logits: (N, C) log-probabilities of the teacher at temperature 1.
        labels: (N,) class numbers.
        groups: (N,) number of each row's group; zeros where there are none.
    """

    logits: np.ndarray
    labels: np.ndarray
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, selected: np.ndarray) -> Rows:
        return Rows(self.logits[selected], self.labels[selected], self.groups[selected])


@dataclass(frozen=True)
class Fit:
    """What was chosen.

    Attributes:
        temperature: that the logits are divided by before they are perturbed.
        scaling_temperature: of the temperature-scaled teacher.
        rankings: of each group's candidates; none for a group without rows.
        tables: coefficients by the strength of the pull towards the shared ones, which is none without a descent:
            (G, M) of the groups, or (C, M) of the classes.
    """

    temperature: float
    scaling_temperature: float
    rankings: tuple[Ranking | None, ...]
    tables: dict[float | None, np.ndarray]

    def base(self, rows: Rows) -> np.ndarray:
        """(N, C) log-probabilities that are perturbed."""
        return rows.logits if self.temperature == 1 else log_probabilities(rows.logits / self.temperature)

    def scaled(self, rows: Rows) -> np.ndarray:
        """(N, C) log-probabilities of the temperature-scaled teacher."""
        return log_probabilities(rows.logits / self.scaling_temperature)

    def proxy(self, rows: Rows, strength: float | None) -> np.ndarray:
        """(N, C) log-probabilities of the proxy teacher; exactly those of ``base`` where the coefficients are zero."""
        table, result = self.tables[strength], self.base(rows)
        if strength is not None:
            return proxy_teacher(result, table)
        coefficients = table[rows.groups]
        is_perturbed = coefficients.any(axis=1)
        result = result.copy()
        result[is_perturbed] = proxy_teacher(result[is_perturbed], coefficients[is_perturbed][:, None, :])
        return result


def fit_perturbation(
    rows: Rows,
    candidates: np.ndarray,
    params: SelectionParams,
    *,
    num_groups: int,
    num_screening_rows: int,
    is_free: np.ndarray | None,
) -> Fit:
    """Chooses temperature and coefficients on ``rows``, and looks at no others.

    Args:
        rows: to choose on.
        candidates: (K, M), the first of which is zero.
        params: how.
        num_groups: of the rows' groups.
        num_screening_rows: over all groups; each gets its share.
        is_free: (C,) which classes get coefficients of their own; none: scope ``class`` is not asked for.
    """
    scaling = fit_temperature(rows.logits, rows.labels, criterion=params.temperature_criterion)
    temperature = scaling if params.fit_temperature else 1.0

    def rank(inside: np.ndarray) -> Ranking | None:
        if not inside.any():
            return None
        return rank_candidates(
            rows.logits[inside] / temperature,
            rows.labels[inside],
            candidates,
            score=params.score,
            num_screening_rows=max(1, round(num_screening_rows * float(inside.mean()))),
            num_finalists=params.num_finalists,
            seed=params.seed,
        )

    rankings = tuple(rank(rows.groups == group) for group in range(num_groups))
    table = np.stack([ranking.best if ranking else np.zeros(params.order) for ranking in rankings])
    tables: dict[float | None, np.ndarray] = {None: table}
    if is_free is not None:
        found = descend(
            rows.logits / temperature,
            rows.labels,
            table[0],
            score=params.score,
            strengths=params.strengths,
            is_free=is_free,
            upper=params.upper,
        )
        tables.update(zip(params.strengths, found, strict=True))
    return Fit(temperature, scaling, rankings, tables)
