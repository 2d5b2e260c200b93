"""What would a point be worth? Regression on the points measured so far."""

import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.svm import SVR

from nncf_ext.exploration.evolution import Integers
from nncf_ext.exploration.fronts import Floats

_FOLDS = 5
_ALPHAS = np.arange(1, 101) / 10
_COSTS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_ITERATIONS = 1_000_000
_LARGEST = 700.0
"""Of a logarithm that has a finite exponential."""


def one_hot(points: Integers, counts: Integers) -> Floats:
    """
    :param points: ``[points, genes]``; gene i is 0 to ``counts[i] - 1``.
    :param counts: ``[genes]``.
    :return: ``[points, sum(counts)]``: a column for each value of each gene, whether it was seen or not.
    """
    return np.concatenate([np.eye(count)[column] for column, count in zip(points.T, counts, strict=True)], axis=1)


class Predictor:
    """
    Ridge regression or a support vector machine with radial kernel, whichever errs less in five-fold cross-validation.

    :param features: ``[points, features]``, at least 2 points.
    :param labels: ``[points]``: values of one objective, finite.

    Source: DyNAS-T's predictor: alpha 0.1 to 10 in steps of 0.1; C 1 to 100, gamma = 1 / features, epsilon 0; score:
    mean absolute percentage error; labels scaled so that the largest has two digits before the point. There C has steps
    of 1; here it takes seven values of that range, since a hundred take most of the time of a round.
    """

    def __init__(self, features: Floats, labels: Floats) -> None:
        largest = float(np.abs(labels).max())
        self._scale = 10.0 ** (math.floor(math.log10(largest)) - 1) if largest > 0 else 1.0
        labels = labels / self._scale
        ridge, machines = np.zeros(len(_ALPHAS)), np.zeros(len(_COSTS))
        for train, held_out in _folds(len(labels)):
            known, new = (features[train], labels[train]), features[held_out]
            truth = labels[held_out, None]
            size = np.maximum(np.abs(truth), np.finfo(float).eps)
            ridge += (np.abs(_ridge(*known)(new) - truth) / size).sum(axis=0)
            predicted = np.stack([_machine(*known, cost)(new) for cost in _COSTS], axis=1)
            machines += (np.abs(predicted - truth) / size).sum(axis=0)
        self.error = float(min(ridge.min(), machines.min())) / len(labels)
        """Mean absolute percentage error in cross-validation, as a fraction."""
        if ridge.min() <= machines.min():
            best, every_alpha = int(ridge.argmin()), _ridge(features, labels)
            self._predict: Callable[[Floats], Floats] = lambda new: every_alpha(new)[:, best]
        else:
            self._predict = _machine(features, labels, _COSTS[int(machines.argmin())])

    def __call__(self, features: Floats) -> Floats:
        """
        :param features: ``[points, features]``.
        :return: ``[points]``: predicted values.
        """
        return self._predict(features) * self._scale


class SmoothPredictor:
    """
    A Gaussian process with a radial kernel and noise, whose parameters have the greatest likelihood; of the logarithm
    where all labels are positive, as losses and costs are.

    :param features: ``[points, features]``, about 0 to 1, at least 2 points.
    :param labels: ``[points]``: values of one objective, finite.
    """

    def __init__(self, features: Floats, labels: Floats) -> None:
        self._logarithm = bool(labels.min() > 0)
        kernel = ConstantKernel(1.0, (0.01, 100)) * RBF(1.0, (0.2, 10)) + WhiteKernel(1e-3, (1e-6, 0.1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            process = GaussianProcessRegressor(kernel, normalize_y=True)
            self._process = process.fit(features, np.log(labels) if self._logarithm else labels)

    def __call__(self, features: Floats) -> Floats:
        """
        :param features: ``[points, features]``.
        :return: ``[points]``: predicted values.
        """
        predicted: Floats = self._process.predict(features)
        return np.exp(np.minimum(predicted, _LARGEST)) if self._logarithm else predicted


def _folds(count: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Places to train on and places held out."""
    places = np.arange(count)
    for held_out in np.array_split(places, min(_FOLDS, count)):
        yield np.delete(places, held_out), held_out


def _ridge(features: Floats, labels: Floats) -> Callable[[Floats], Floats]:
    """Predictions ``[points, alphas]`` of ridge regression with every alpha, by one singular value decomposition."""
    middle, level = features.mean(axis=0), labels.mean()
    left, sizes, right = np.linalg.svd(features - middle, full_matrices=False)
    shrunk = sizes / (sizes**2 + _ALPHAS[:, None])
    weights = (shrunk * (left.T @ (labels - level))) @ right
    return lambda new: (new - middle) @ weights.T + level


def _machine(features: Floats, labels: Floats, cost: float) -> Callable[[Floats], Floats]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return SVR(C=cost, gamma="auto", epsilon=0.0, max_iter=_ITERATIONS).fit(features, labels).predict
