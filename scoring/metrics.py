"""Scores of separated signals, on arrays."""

from __future__ import annotations

import numpy as np

WORST_DB = -30.0  # a silent estimate is infinitely bad; scores are averaged from here up
BEST_DB = 30.0  # and a copy of the truth infinitely good: one song must not outweigh all others


def si_sdr(estimate: np.ndarray, reference: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio.

    Parameters
    ----------
    estimate, reference : np.ndarray, shape=(n_samples,) or (n_channels, n_samples)
        Channels are scored together, as one long signal.

    Returns
    -------
    float
        [dB]; higher is better, 0 dB is as much error as voice, the scale of `estimate` does not
        matter. NaN if `reference` is silent: there is nothing to find. -inf if `estimate` holds
        nothing of it.

    References
    ----------
    .. [1] Le Roux et al., "SDR – half-baked or well done?", ICASSP 2019, equations 3 and 4.
    """
    estimate = np.asarray(estimate, dtype=np.float64).ravel()
    reference = np.asarray(reference, dtype=np.float64).ravel()
    energy = reference @ reference
    if energy == 0:
        return float("nan")
    target = reference * ((estimate @ reference) / energy)
    noise = estimate - target
    with np.errstate(divide="ignore"):
        return float(10 * np.log10((target @ target) / max(noise @ noise, 1e-300)))
