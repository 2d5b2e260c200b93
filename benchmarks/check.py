"""Do two arms compute the same? The tolerances follow from the roundings each arm makes, none is tuned."""

from __future__ import annotations

import numpy as np

from ov_ext.cpu_plugin.support.weight import Weight

# Rounding to bf16 moves a value by at most 2^-9 of its magnitude, uniformly: this is the standard deviation.
BF16 = 2.0**-9 / np.sqrt(3.0)
SEGMENT = 128  # the coarsest group either arm scales activations by
SIGMAS = 8.0  # a sum of many independent roundings is normal: chance exceeds this once in 10^15 outputs
# Rounding normal values to 8 bits in groups of 128 (largest about 2.7 sigma, 127 steps): the coarsest rounding in any
# arm. It happens to activations of integer weights, and to keys and values, which stock caches as u8.
EIGHT_BITS = 2.7 / 127 / np.sqrt(12.0)


class WrongResult(RuntimeError):
    """An arm computes something else, so its times would mean nothing."""


def check_linear(name: str, x: np.ndarray, weight: Weight, y: np.ndarray) -> None:
    """Compare a linear layer with numpy.

    :param name: For the message.
    :param x: Activations, float32 ``[rows, K]``.
    :param weight: ``[N, K]``.
    :param y: What an arm computed, float32 ``[rows, N]``.
    :raises WrongResult: An output is farther from numpy's than :data:`SIGMAS` standard deviations of what rounding
        activations (to bf16, and to 8 bits by group for integer weights), weights and outputs to bf16 can do.
    """
    dense = weight.dequantize()
    exact = x @ dense.T
    variance = (2 * BF16**2) * (x**2 @ (dense**2).T) + (BF16 * exact) ** 2
    if weight.kind != "bf16":
        rows, k = x.shape
        groups = np.zeros((rows, -(-k // SEGMENT) * SEGMENT), np.float32)
        groups[:, :k] = np.abs(x)
        step = groups.reshape(rows, -1, SEGMENT).max(axis=2) / 127
        variance += (np.repeat(step, SEGMENT, axis=1)[:, :k] ** 2 / 12) @ (dense**2).T
    excess = np.abs(y - exact) / (SIGMAS * np.sqrt(variance) + np.finfo(np.float32).tiny)
    worst = float(excess.max(initial=0.0))
    if not worst <= 1.0:  # NaN fails, too
        raise WrongResult(f"{name}: an output is {worst:.1f} times its tolerance away from numpy's.")


def check_network(name: str, reference: np.ndarray, y: np.ndarray, linears: int) -> None:
    """Compare the outputs of two arms after many layers.

    :param name: For the message.
    :param reference: What stock computed.
    :param y: What the packed arm computed.
    :param linears: Linear layers on the way; each adds a relative error of :data:`EIGHT_BITS` in quadrature, in both
        arms.
    :raises WrongResult: The relative distance (L2) exceeds twice that. Different weights give about 1.4.
    """
    distance = float(np.linalg.norm(y - reference) / np.linalg.norm(reference))
    tolerance = 2.0 * np.sqrt(2.0 * linears) * EIGHT_BITS
    if not distance <= tolerance:
        raise WrongResult(f"{name}: the arms differ by {distance:.3f} of the outputs, {tolerance:.3f} is possible.")
