"""Derives the polynomial of kernels/cuda/formulas.cuh: 2^f = 1 + c1 f + ... + c6 f^6 for |f| <= 0.52.

Minimax in relative error (Lawson's reweighted least squares on Chebyshev points, in float64), with the constant term
fixed at 1 so that 2^0 is exact. Coefficients are rounded to float32 one at a time, lowest degree first, and the rest
fitted again after each: that keeps the error near 4e-9, where rounding all at once leaves 1.3e-8.

    python csrc/cpu/fit_exp2.py
"""

from __future__ import annotations

import numpy as np

DEGREE = 6
HALF_WIDTH = 0.52  # rounding leaves 0.5; the rest is log2(e)'s low part times z, which t leaves out: room for |z| < 1e6


def fit(fixed: list[float], points: int = 4001, rounds: int = 300) -> np.ndarray:
    """The remaining coefficients, given the first ones, that make the largest relative error smallest."""
    f = HALF_WIDTH * np.cos(np.linspace(0.0, np.pi, points))
    truth = np.exp2(f)
    known = 1.0 + sum(c * f**d for d, c in enumerate(fixed, start=1))
    free = np.stack([f**d for d in range(len(fixed) + 1, DEGREE + 1)], axis=1) / truth[:, None]
    wanted = (truth - known) / truth
    weight = np.full(points, 1.0 / points)
    best, best_error = None, np.inf
    for _ in range(rounds):
        root = np.sqrt(weight)
        coefficients = np.linalg.lstsq(free * root[:, None], wanted * root, rcond=None)[0]
        error = np.abs(free @ coefficients - wanted)
        if error.max() < best_error:
            best, best_error = coefficients, error.max()
        weight *= error
        weight /= weight.sum()
    assert best is not None
    return best


def coefficients() -> list[float]:
    """c1 ... c6 as float32 values."""
    fixed: list[float] = []
    while len(fixed) < DEGREE:
        fixed.append(float(np.float32(fit(fixed)[0])))
    return fixed


def relative_error(values: list[float]) -> float:
    """Largest relative error of the polynomial, evaluated in float64."""
    f = np.linspace(-HALF_WIDTH, HALF_WIDTH, 200_001)
    polynomial = 1.0 + sum(c * f**d for d, c in enumerate(values, start=1))
    return float(np.max(np.abs(polynomial / np.exp2(f) - 1.0)))


if __name__ == "__main__":
    found = coefficients()
    for degree, value in enumerate(found, start=1):
        print(f"c{degree} = {value:.9g}f")
    print(f"largest relative error {relative_error(found):.2e}")
    log2e = float(np.float32(np.log2(np.e)))
    print(f"log2(e) = {log2e:.9g}f + {np.float32(np.log2(np.longdouble(np.e)) - log2e):.9g}f")
