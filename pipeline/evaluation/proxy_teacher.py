"""The proxy teacher: what a student that minimises the perturbed loss ends up with."""

from __future__ import annotations

import numpy as np

from pipeline.errors import ConfigError, ModelError

TOLERANCE = 1e-10
"""Relative error of lambda, and of every probability that is not near 1."""

_CHUNK_SIZE = 32_768  # numbers worked on at a time: the dozen arrays of an iteration then stay in the core's cache
_MAX_ITERATIONS = 500  # 4 on average; tens where a coefficient is -1/m and the teacher all but certain


def proxy_teacher(teacher_logits: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """Logarithms of the probabilities at which the perturbed loss of a row is least.

    ``argmin_q sum_c p_c (-log q_c + sum_m eps_cm (1 - q_c)^m)`` over the simplex, with ``p = softmax(z_t)``. There
    ``p_c (1 / q_c + sum_m m eps_cm (1 - q_c)^(m-1)) = lambda`` for every class: Newton steps in ``log q`` and
    ``log lambda``, several rows at a time, until the left sides of a row agree to ``TOLERANCE``. The smallest and the
    largest of them enclose lambda, so what is returned is never merely where the iteration stopped.

    Args:
        teacher_logits: (B, C) logits or log-probabilities; -inf for a class of probability 0, which keeps it.
        coefficients: (M,) shared, (C, M) a class, or (B, 1, M) or (B, C, M) a row; eps_m at least -1/m, where
            the loss is convex and has one minimum.

    Returns:
        (B, C) float64 log-probabilities. Zero coefficients give those of the teacher. Shared ones keep the order of
        the classes of a row.

    Raises:
        ConfigError: a coefficient is below -1/m or not finite.
        ModelError: the shapes do not fit, or a row of logits has NaN, +inf or nothing but -inf.

    Source: arXiv 2305.05010, which equates the perturbed loss with the KL divergence to a proxy teacher and solves
    for it numerically in a way that we could not read; the minimum of the loss is our reading of it.
    """
    log_p = log_probabilities(teacher_logits)
    bases = check_coefficients(coefficients, *log_p.shape)
    result = np.empty_like(log_p)
    rows = max(1, _CHUNK_SIZE // log_p.shape[1])
    for begin in range(0, len(log_p), rows):
        part = slice(begin, begin + rows)
        result[part] = _solve(log_p[part], bases[part] if bases.ndim == 3 else bases)
    return result


def pull_back(log_proxy: np.ndarray, coefficients: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """Gradient with respect to per-class coefficients of a function of the proxy teacher.

    By the implicit function theorem at the minimum, without differentiating the iterations.

    Args:
        log_proxy: (B, C) from ``proxy_teacher`` with these ``coefficients``.
        coefficients: (C, M).
        gradient: (B, C) derivative of the function with respect to the proxy teacher's probabilities.

    Returns:
        (C, M), summed over the rows.
    """
    bases = check_coefficients(coefficients, *log_proxy.shape)
    result = np.zeros(coefficients.shape)
    rows = max(1, _CHUNK_SIZE // log_proxy.shape[1])
    for begin in range(0, len(log_proxy), rows):
        part = slice(begin, begin + rows)
        _, q, u, _ = _normalise(np.maximum(log_proxy[part], _least_log(coefficients.shape[-1])))
        height, slope = _curve(q, u, bases)
        # d log q_c = (q_c / height_c * sum_m m u^(m-1) d eps_cm - d log lambda) / slope_c, and the q sum to 1.
        weight = q / slope
        pull = gradient[part] * weight
        pull -= weight * (pull.sum(axis=1, keepdims=True) / weight.sum(axis=1, keepdims=True))
        pull *= q / height
        for index in range(coefficients.shape[-1]):
            result[:, index] += (index + 1) * pull.sum(axis=0)
            pull *= u
    return result


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """``log softmax`` of each row in float64; ModelError where that has no meaning (see ``proxy_teacher``)."""
    values = np.asarray(logits, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] < 1:
        raise ModelError(f"the teacher's logits have shape {values.shape} where (rows, classes) is expected.")
    top = values.max(axis=1, keepdims=True, initial=-np.inf)
    if not np.isfinite(top).all():
        row = int(np.flatnonzero(~np.isfinite(top[:, 0]))[0])
        raise ModelError(
            f"row {row} of the teacher's logits has no finite largest value ({top[row, 0]}): it gives no "
            "probabilities; look for NaN or infinity in the teacher's output."
        )
    shifted = values - top
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def check_coefficients(coefficients: np.ndarray, num_rows: int, num_classes: int) -> np.ndarray:
    """``1 + m eps_m``, at least 0, in the shape of the coefficients; errors as of ``proxy_teacher``."""
    values = np.asarray(coefficients, dtype=np.float64)
    allowed = ((), (num_classes,), (num_rows, 1), (num_rows, num_classes))
    if values.ndim == 0 or values.shape[:-1] not in allowed or values.shape[-1] == 0:
        raise ModelError(
            f"coefficients of shape {values.shape} do not fit {num_rows} rows of {num_classes} classes: expected "
            "(order,), (classes, order), (rows, 1, order) or (rows, classes, order)."
        )
    bases: np.ndarray = 1 + values * np.arange(1, values.shape[-1] + 1)
    bad = ~(bases >= -1e-9) | ~np.isfinite(bases)
    if bad.any():
        index = tuple(int(number[0]) for number in np.nonzero(bad))
        raise ConfigError(
            f"coefficient {index[-1] + 1} of the perturbation is {values[index]:g} but at least "
            f"-1/{index[-1] + 1} is needed: below that the perturbed loss may have several minima."
        )
    return np.maximum(bases, 0)


def _solve(log_p: np.ndarray, bases: np.ndarray) -> np.ndarray:
    """``proxy_teacher`` of a chunk; only rows that are not finished are worked on."""
    result = np.empty_like(log_p)
    rows = np.arange(len(log_p))
    target = log_q = np.maximum(log_p, _least_log(bases.shape[-1]))
    for iteration in range(_MAX_ITERATIONS):
        log_q, q, u, top = _normalise(log_q)
        height, slope = _curve(q, u, bases)
        log_lambda = target - log_q
        log_lambda += np.log(height)
        unfinished = log_lambda.max(axis=1) - log_lambda.min(axis=1) > TOLERANCE
        if not unfinished.all():
            finished = rows[~unfinished]
            # For the clipped classes q = p / lambda, whatever the coefficients.
            log_q[~unfinished] += log_p[finished] - target[~unfinished]
            result[finished] = _normalise(log_q[~unfinished])[0]
            if not unfinished.any():
                return result
            rows, target, log_q, log_lambda = (values[unfinished] for values in (rows, target, log_q, log_lambda))
            q, slope, top = q[unfinished], slope[unfinished], top[unfinished]
            bases = bases[unfinished] if bases.ndim == 3 else bases
        weight = q / slope
        common = (weight * log_lambda).sum(axis=1) / weight.sum(axis=1)
        step = (log_lambda - common[:, None]) / slope
        # Far from the solution a full step may overshoot and come back for ever.
        limit = 4 / (1 + iteration // 30)
        np.clip(step, -limit, limit, out=step)
        # The largest class's own slope may be all but 0; its step follows from that of the others.
        numbers = np.arange(len(rows))
        step[numbers, top] = 0
        step[numbers, top] = np.clip(-(q * step).sum(axis=1) / q[numbers, top], -limit, limit)
        log_q += step
    raise ArithmeticError(f"{len(rows)} proxy teachers were not found in {_MAX_ITERATIONS} Newton steps")


def _least_log(order: int) -> float:
    """The logarithm that smaller ones are worked on as.

    Its exponential counts for nothing beside 1, but the powers of it that arise do not vanish.
    """
    return -600 / (order + 1)


def _normalise(log_q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """``log q`` shifted so that q sums to 1, q, 1 - q and the number of the largest class.

    The largest class is 1 minus the sum of the others, so that its ``1 - q`` and ``log q`` keep all their digits.
    """
    rows = np.arange(len(log_q))
    top = log_q.argmax(axis=1)
    log_q = log_q - log_q[rows, top][:, None]
    q = np.exp(log_q)
    q[rows, top] = 0
    others = q.sum(axis=1)
    q /= (1 + others)[:, None]
    q[rows, top] = 1 / (1 + others)
    u = 1 - q
    u[rows, top] = others / (1 + others)
    log_q -= np.log1p(others)[:, None]
    return log_q, q, u, top


def _curve(q: np.ndarray, u: np.ndarray, bases: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``height = 1 + sum_m m eps_m q u^(m-1)``, that is q lambda / p, and ``-d log(height / q) / d log q``.

    With ``1/q = sum_{m<=M} u^(m-1) + u^M / q`` the height is ``q sum_m (1 + m eps_m) u^(m-1) + u^M``, a sum of
    terms that are all positive: nothing cancels, at the border of what is admissible neither.
    """
    order = bases.shape[-1]
    value = np.empty_like(q)
    value[...] = bases[..., order - 1]
    derivative = np.zeros_like(q)
    for index in range(order - 2, -1, -1):
        derivative *= u
        derivative += value
        value *= u
        value += bases[..., index]
    tail = u ** (order - 1)
    height = q * value
    height += tail * u
    np.maximum(height, 1e-300, out=height)
    derivative *= q
    derivative += order * tail
    derivative *= q
    derivative += tail * u
    derivative /= height
    return height, np.maximum(derivative, 1e-30, out=derivative)
