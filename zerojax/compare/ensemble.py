"""Several runs of one network on one data set: what they gain together, how much they vary.

Shapes are written as suffixes: R runs, N held-out examples, C classes. On the host, in float64.
"""

import itertools

import numpy as np

from zerojax.compare.similarity import disagreement


def ensemble_accuracy(probabilities_RxNxC: np.ndarray, labels_N: np.ndarray) -> float:
    """Accuracy of the class with the largest mean probability over the runs."""
    mean_NxC = np.mean(probabilities_RxNxC, axis=0, dtype=np.float64)
    return float(np.mean(np.argmax(mean_NxC, axis=-1) == labels_N))


def diversity(classes_RxN: np.ndarray) -> float:
    """Mean share of examples on which two of the runs predict different classes, over all pairs.

    Raises:
        ValueError: there are less than two runs.
    """
    _require_two(len(classes_RxN), 'runs')
    return float(np.mean([disagreement(a, b) for a, b in itertools.combinations(classes_RxN, 2)]))


def variance_on_test_set(correct_RxN: np.ndarray) -> float:
    """Variance between runs of the accuracy on these N examples, unbiased: divided by R - 1.

    `correct_RxN` are bools: whether the run's class is right.

    Raises:
        ValueError: there are less than two runs.
    """
    _require_two(len(correct_RxN), 'runs')
    return float(np.var(np.mean(correct_RxN, axis=1, dtype=np.float64), ddof=1))


def variance_on_distribution(correct_RxN: np.ndarray) -> float:
    """Unbiased estimate of the variance between runs of the accuracy on the whole distribution.

    Jordan, "On the Variance of Neural Network Training with respect to Test Sets and
    Distributions", ICLR 2024. Runs that are equally good on the distribution still differ on a
    finite test set, by chance on each example; this estimate leaves that part out.

    Let C_i be 1 if a run, drawn at random, is right on test example i, else 0, and p_i its mean
    over runs. The accuracy on the test set is the mean of C_i over i, so its variance over runs is

        V = Σ_i p_i (1 - p_i) / N² + Σ_{i≠j} cov(C_i, C_j) / N².

    For examples i ≠ j drawn independently of each other, cov(C_i, C_j) has as its mean over such
    pairs E[a²] - E[a]², where a = E_i[C_i] is a run's accuracy on the distribution: the variance D
    that we ask for. So, over test sets, E[V] = E[p (1 - p)] / N + (1 - 1/N) D, and therefore

        D = N / (N - 1) · E[ V - Σ_i p_i (1 - p_i) / N² ].

    Put in for V and for p_i (1 - p_i) their unbiased estimates from R runs, the sample variance
    s² of the accuracies and R / (R - 1) p̂_i (1 - p̂_i) with p̂_i the share of runs that are right:

        N / (N - 1) · ( s² - Σ_i R / (R - 1) p̂_i (1 - p̂_i) / N² ),

    which is the mean sample covariance of C_i and C_j over all pairs i ≠ j. It can
    be negative, as any unbiased estimate of what may be 0.

    Args:
        correct_RxN: bools, whether the run's class is right.

    Raises:
        ValueError: there are less than two runs or less than two examples.
    """
    runs, examples = correct_RxN.shape
    _require_two(runs, 'runs')
    _require_two(examples, 'examples')
    by_example_N = np.var(np.asarray(correct_RxN, np.float64), axis=0, ddof=1)
    by_chance = np.sum(by_example_N) / examples**2
    return float((variance_on_test_set(correct_RxN) - by_chance) * examples / (examples - 1))


def _require_two(count: int, what: str) -> None:
    if count < 2:
        raise ValueError(f'{count} {what}: must be at least 2')
