"""How sure a mean over records is: the percentile bootstrap (Efron & Tibshirani 1993)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RESAMPLES = 2_000


def resampled_means(values: "NDArray[np.float64]", seed: int = 0) -> "NDArray[np.float64]":
    """Return the means of each column over resamples of the rows, all columns over the same ones.

    Args:
        values: of shape (records, columns); NaN has no part in a mean, and the mean of nothing is 0.
        seed: of the resampling.

    Returns:
        Means of shape (:data:`RESAMPLES`, columns).
    """
    import numpy as np

    records, columns = values.shape
    present = (~np.isnan(values)).astype(np.float64)
    filled, rng, means = np.nan_to_num(values), np.random.default_rng(seed), np.zeros((RESAMPLES, columns))
    for resample in range(RESAMPLES if records else 0):
        times = np.bincount(rng.integers(records, size=records), minlength=records).astype(np.float64)
        means[resample] = times @ filled / np.maximum(1, times @ present)
    return means


def interval(means: "NDArray[np.float64]") -> tuple[float, float]:
    """Return the 95 % interval of resampled means."""
    import numpy as np

    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
