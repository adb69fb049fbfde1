"""Gain and variance of several runs, against enumeration and simulation."""

import itertools

import numpy as np
import pytest

from zerojax.compare import ensemble


def test_ensemble_averages_probabilities_and_not_votes():
    probabilities = np.array([[[0.9, 0.1]], [[0.4, 0.6]], [[0.45, 0.55]]])
    assert ensemble.ensemble_accuracy(probabilities, np.array([0])) == 1
    assert ensemble.ensemble_accuracy(probabilities[1:], np.array([0])) == 0


def test_diversity_is_the_mean_over_pairs():
    classes = np.array([[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 1, 0]])
    assert ensemble.diversity(classes) == pytest.approx((1 / 4 + 2 / 4 + 1 / 4) / 3)


def test_the_estimate_is_the_mean_covariance_of_two_different_examples():
    correct = np.random.default_rng(0).random((5, 40)) < 0.7
    covariances = np.cov(correct.T, ddof=1)
    pairs = covariances[~np.eye(40, dtype=bool)]
    assert ensemble.variance_on_distribution(correct) == pytest.approx(pairs.mean(), abs=1e-15)
    assert ensemble.variance_on_test_set(correct) == pytest.approx(covariances.mean(), abs=1e-15)


def test_unbiased_over_all_runs_and_all_test_sets():
    """All test sets of 3 from a distribution of 4 examples, all draws of 2 from 5 possible runs."""
    population = np.random.default_rng(1).random((5, 4)) < 0.6
    truth = np.var(population.mean(axis=1))
    estimates = [
        ensemble.variance_on_distribution(population[np.ix_(runs, examples)])
        for runs in itertools.product(range(5), repeat=2)
        for examples in itertools.product(range(4), repeat=3)
    ]
    assert truth > 0.01
    assert np.mean(estimates) == pytest.approx(truth, rel=1e-12)


def simulate(quality_of_runs, trials=3000, runs=4, examples=100):
    """Runs that are right on each example by chance alone, given their own quality."""
    rng = np.random.default_rng(2)
    difficulty = rng.uniform(0.2, 0.6, examples)
    on_test_set, on_distribution = [], []
    for _ in range(trials):
        p = difficulty + quality_of_runs(rng, runs)
        correct = rng.random((runs, examples)) < p
        on_test_set.append(ensemble.variance_on_test_set(correct))
        on_distribution.append(ensemble.variance_on_distribution(correct))
    return difficulty, np.array(on_test_set), np.array(on_distribution)


def assert_mean(values, expected):
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values) - expected) < 4 * error
    return error


def test_runs_of_one_quality_vary_on_the_test_set_only():
    p, on_test_set, on_distribution = simulate(lambda rng, runs: np.zeros((runs, 1)))
    expected = np.sum(p * (1 - p)) / len(p) ** 2
    assert_mean(on_test_set, expected)
    error = assert_mean(on_distribution, 0)
    assert error < expected / 20, 'sharp enough to see the part that is subtracted'


def test_runs_of_different_quality_vary_on_the_distribution():
    sigma = 0.1
    _, on_test_set, on_distribution = simulate(
        lambda rng, runs: sigma * rng.choice([-1, 1], (runs, 1))
    )
    error = assert_mean(on_distribution, sigma**2)
    assert np.mean(on_test_set) - sigma**2 > 5 * error


@pytest.mark.parametrize('shape,message', [((1, 9), '1 runs'), ((3, 1), '1 examples')])
def test_too_few(shape, message):
    with pytest.raises(ValueError, match=message):
        ensemble.variance_on_distribution(np.ones(shape, bool))
    with pytest.raises(ValueError, match='1 runs'):
        ensemble.diversity(np.zeros((1, 3), int))
