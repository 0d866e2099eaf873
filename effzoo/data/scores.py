"""Scores of several labels at once and of numbers, as `metrics` for `effzoo.finetune`."""

from __future__ import annotations

from typing import Any

import numpy as np

from effzoo.errors import DataError, shown


def label_metrics(prediction: Any) -> dict[str, float]:
    """precision, recall and f1 over all labels that hold (micro average), and the share of rows with all labels right.

    A label is predicted where its logit is above 0, its probability above 1/2. 0 / 0 is 0.

    prediction: predictions [rows, labels], label_ids of 0 and 1 alike.
    """
    _check(prediction)
    true, found = np.asarray(prediction.label_ids) > 0.5, np.asarray(prediction.predictions) > 0
    hits, there, given = int((true & found).sum()), int(true.sum()), int(found.sum())
    return {
        "precision": hits / given if given else 0.0,
        "recall": hits / there if there else 0.0,
        "f1": 2 * hits / (there + given) if there + given else 0.0,
        "exact_match": float((true == found).all(axis=1).mean()),
    }


def number_metrics(prediction: Any) -> dict[str, float]:
    """Pearson's correlation, Spearman's (that of the ranks, equal ones in the mean), and the mean squared error.

    A correlation with something constant is not defined, and nan.

    prediction: predictions [rows, 1] and label_ids [rows].
    """
    _check(prediction)
    found = np.asarray(prediction.predictions, dtype=np.float64).reshape(-1)
    true = np.asarray(prediction.label_ids, dtype=np.float64).reshape(-1)
    return {
        "pearson": _correlation(true, found),
        "spearman": _correlation(_ranks(true), _ranks(found)),
        "mse": float(np.mean((true - found) ** 2)),
    }


def _check(prediction: Any) -> None:
    if not hasattr(prediction, "predictions") or not hasattr(prediction, "label_ids"):
        raise DataError(
            f"a metric reads transformers.EvalPrediction, with predictions and label_ids, got {shown(prediction)}"
        )


def _correlation(x: Any, y: Any) -> float:
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size else float("nan")


def _ranks(x: Any) -> Any:
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]
