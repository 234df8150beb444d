"""Linear regression with a penalty chosen by leave-one-out errors: many targets at once, in closed form.

It reads out what is linear in some vectors. Every target has its own penalty, so that neither the scale of the vectors nor
the frequency of a target decides how well it is read out.

Legend: n samples, e inputs, c targets.
"""

from dataclasses import dataclass

import numpy as np

#: Penalties per sample, relative to the variance of a standardised input.
_PENALTIES = 10.0 ** np.arange(-4, 3)
_SMALLEST_LEFT = 1e-6  # of a sample's leverage, below which its leave-one-out error would be rounding


@dataclass(frozen=True)
class Ridge:
    """A fitted regression: the mean and scale of its inputs [e], its weights [e, c], and the mean of its targets [c]."""

    mean_e: np.ndarray
    scale_e: np.ndarray
    weights_ec: np.ndarray
    offset_c: np.ndarray

    def predict(self, x_ne: np.ndarray) -> np.ndarray:
        """Return the predicted targets, float64 [n, c]."""
        return (x_ne - self.mean_e) / self.scale_e @ self.weights_ec + self.offset_c


def fit_ridge(x_ne: np.ndarray, y_nc: np.ndarray) -> Ridge:
    """Fit a regression on standardised inputs. An input that is constant has no weight.

    Args:
        x_ne: Inputs.
        y_nc: Targets: numbers, or bool.
    """
    x_ne, y_nc = x_ne.astype(np.float64), y_nc.astype(np.float64)
    mean_e, scale_e, offset_c = x_ne.mean(0), x_ne.std(0), y_nc.mean(0)
    scale_e = np.where(scale_e > 1e-9 * np.abs(x_ne).max(0), scale_e, np.inf)
    z_ne, y_nc = (x_ne - mean_e) / scale_e, y_nc - offset_c
    values_e, vectors_ee = np.linalg.eigh(z_ne.T @ z_ne)
    values_e, rotated_ne = values_e.clip(0), z_ne @ vectors_ee
    products_ec = rotated_ne.T @ y_nc
    penalties = _PENALTIES * len(x_ne)
    errors = [_left_out_errors(rotated_ne, values_e + penalty, products_ec, y_nc) for penalty in penalties]
    chosen_c = penalties[np.argmin(errors, axis=0)]
    weights_ec = vectors_ee @ (products_ec / (values_e[:, None] + chosen_c))
    return Ridge(mean_e, scale_e, weights_ec, offset_c)


def _left_out_errors(
    rotated_ne: np.ndarray, penalised_e: np.ndarray, products_ec: np.ndarray, y_nc: np.ndarray
) -> np.ndarray:
    """Return the sum of squared errors of each sample, predicted from all others, float64 [c]."""
    leverage_n = 1 / len(y_nc) + (rotated_ne**2 / penalised_e).sum(1)
    left_n = np.maximum(1 - leverage_n, _SMALLEST_LEFT)
    residuals_nc = y_nc - rotated_ne @ (products_ec / penalised_e[:, None])
    return ((residuals_nc / left_n[:, None]) ** 2).sum(0)
