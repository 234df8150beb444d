"""Test the regression: its leave-one-out errors are those of fits without the sample, and its penalty fits the target."""

import numpy as np
import pytest

from opt_ds.evaluation import ridge
from opt_ds.evaluation.ridge import fit_ridge


def brute_force_errors(x_ne: np.ndarray, y_nc: np.ndarray, penalty: float) -> np.ndarray:
    """Return the sum of squared errors of each sample, predicted by a fit on the others, [c]."""
    total = np.zeros(y_nc.shape[1])
    for left in range(len(x_ne)):
        kept = np.arange(len(x_ne)) != left
        mean_e, mean_c = x_ne[kept].mean(0), y_nc[kept].mean(0)
        z_ne = x_ne[kept] - mean_e
        weights = np.linalg.solve(z_ne.T @ z_ne + penalty * np.eye(z_ne.shape[1]), z_ne.T @ (y_nc[kept] - mean_c))
        total += (y_nc[left] - mean_c - (x_ne[left] - mean_e) @ weights) ** 2
    return total


def test_the_chosen_penalty_is_that_of_the_smallest_left_out_error() -> None:
    random = np.random.default_rng(0)
    x_ne = random.normal(size=(30, 6))
    x_ne = (x_ne - x_ne.mean(0)) / x_ne.std(0)
    y_nc = np.stack([x_ne @ random.normal(size=6), random.normal(size=30), x_ne[:, 0] + random.normal(size=30)], axis=1)
    found = fit_ridge(x_ne, y_nc)
    for c in range(3):
        errors = [brute_force_errors(x_ne, y_nc[:, [c]], 30 * penalty)[0] for penalty in ridge._PENALTIES]
        best = 30 * ridge._PENALTIES[int(np.argmin(errors))]
        expected = np.linalg.solve(x_ne.T @ x_ne + best * np.eye(6), x_ne.T @ (y_nc[:, c] - y_nc[:, c].mean()))
        np.testing.assert_allclose(found.weights_ec[:, c], expected, atol=1e-9)
    assert np.abs(found.predict(x_ne)[:, 0] - y_nc[:, 0]).max() < 0.05


def test_neither_scale_nor_a_constant_input_matters() -> None:
    random = np.random.default_rng(1)
    x_ne = random.normal(size=(50, 3))
    y_nc = (x_ne[:, :1] > 0).astype(bool)
    scaled = np.concatenate([x_ne * [1e-3, 1, 1e3] + [5, 0, -7], np.full((50, 1), 0.1)], axis=1)
    tested = random.normal(size=(9, 3))
    tested_scaled = np.concatenate([tested * [1e-3, 1, 1e3] + [5, 0, -7], np.full((9, 1), 3.0)], axis=1)
    plain, other = fit_ridge(x_ne, y_nc).predict(tested), fit_ridge(scaled, y_nc).predict(tested_scaled)
    np.testing.assert_allclose(plain, other, atol=1e-6)


@pytest.mark.parametrize("samples", [2, 5])
def test_fewer_samples_than_inputs_are_fitted_without_overflow(samples: int) -> None:
    random = np.random.default_rng(2)
    found = fit_ridge(random.normal(size=(samples, 20)), random.normal(size=(samples, 4)))
    assert np.isfinite(found.predict(random.normal(size=(3, 20)))).all()
