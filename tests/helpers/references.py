"""The layers of the network and their gradients as plain NumPy loops in float64.

Written from the formulas, element by element, and independent of `alexnet_jax.nets.layers`; slow, so
only for small arrays. Arrays are NHWC. `g` is the gradient of some scalar with respect to a layer's
output, and every `*_grad` returns the gradient of that scalar with respect to the layer's inputs.
`test_layers.py` checks the gradients with numerical differences and the values against SciPy.
"""

import math

import numpy as np


def conv(x, kernel, bias, stride=1, padding=((0, 0), (0, 0))):
    """x[B,H,W,C], kernel[k,k,C,O], bias[O] -> [B,H',W',O]; pixels outside the image are zero."""
    (top, bottom), (left, right) = padding
    batch, height, width, _ = x.shape
    k = kernel.shape[0]
    rows = (height + top + bottom - k) // stride + 1
    columns = (width + left + right - k) // stride + 1
    y = np.zeros((batch, rows, columns, kernel.shape[3]))
    for b, r, c in np.ndindex(batch, rows, columns):
        y[b, r, c] = bias
        for i, j in np.ndindex(k, k):
            h, w = r * stride + i - top, c * stride + j - left
            if 0 <= h < height and 0 <= w < width:
                y[b, r, c] += x[b, h, w] @ kernel[i, j]
    return y


def conv_grad(x, kernel, g, stride=1, padding=((0, 0), (0, 0))):
    """-> gradients of x, kernel and bias: each product x * kernel of `conv` sends g to both."""
    (top, _), (left, _) = padding
    _, height, width, _ = x.shape
    k = kernel.shape[0]
    dx, dkernel, dbias = np.zeros(x.shape), np.zeros(kernel.shape), np.zeros(kernel.shape[3])
    for b, r, c in np.ndindex(g.shape[:3]):
        dbias += g[b, r, c]
        for i, j in np.ndindex(k, k):
            h, w = r * stride + i - top, c * stride + j - left
            if 0 <= h < height and 0 <= w < width:
                dx[b, h, w] += kernel[i, j] @ g[b, r, c]
                dkernel[i, j] += np.outer(x[b, h, w], g[b, r, c])
    return dx, dkernel, dbias


def dense(x, kernel, bias):
    """x[B,I], kernel[I,O], bias[O] -> [B,O]."""
    y = np.zeros((x.shape[0], kernel.shape[1]))
    for b, o in np.ndindex(y.shape):
        y[b, o] = bias[o] + sum(x[b, i] * kernel[i, o] for i in range(x.shape[1]))
    return y


def dense_grad(x, kernel, g):
    """-> gradients of x, kernel and bias."""
    dx, dkernel, dbias = np.zeros(x.shape), np.zeros(kernel.shape), np.zeros(kernel.shape[1])
    for b, o in np.ndindex(g.shape):
        dbias[o] += g[b, o]
        for i in range(x.shape[1]):
            dx[b, i] += kernel[i, o] * g[b, o]
            dkernel[i, o] += x[b, i] * g[b, o]
    return dx, dkernel, dbias


def channel_window(at, shape, n):
    """The elements that inhibit element `at` across channels: i-n/2..i+n/2, clipped (§3.3)."""
    b, h, w, c = at
    return [(b, h, w, j) for j in range(max(0, c - n // 2), min(shape[3] - 1, c + n // 2) + 1)]


def map_window(at, shape, n):
    """The elements that inhibit element `at` within its own map: n x n, clipped."""
    b, h, w, c = at
    return [
        (b, i, j, c)
        for i in range(max(0, h - n // 2), min(shape[1] - 1, h + n // 2) + 1)
        for j in range(max(0, w - n // 2), min(shape[2] - 1, w + n // 2) + 1)
    ]


def normalize(x, window, alpha, k, n, beta):
    """x[B,H,W,C] -> x / (k + alpha * sum of x² over the window)^beta."""
    y = np.zeros(x.shape)
    for at in np.ndindex(x.shape):
        d = k + alpha * sum(x[other] ** 2 for other in window(at, x.shape, n))
        y[at] = x[at] * d**-beta
    return y


def normalize_grad(x, g, window, alpha, k, n, beta):
    """-> gradient of x: y = x * d^-beta depends on its own x and on every x inside its d."""
    dx = np.zeros(x.shape)
    for at in np.ndindex(x.shape):
        d = k + alpha * sum(x[other] ** 2 for other in window(at, x.shape, n))
        dx[at] += g[at] * d**-beta
        for other in window(at, x.shape, n):
            dx[other] += g[at] * x[at] * -beta * d ** (-beta - 1) * 2 * alpha * x[other]
    return dx


def max_pool(x, window, stride):
    """x[B,H,W,C] -> [B,H',W',C], H' = 1 + ceil((H - window) / stride); existing pixels only."""
    rows, columns = (1 + math.ceil((size - window) / stride) for size in x.shape[1:3])
    y = np.zeros((x.shape[0], rows, columns, x.shape[3]))
    for b, r, c, channel in np.ndindex(y.shape):
        pixels = pool_pixels(x, r, c, window, stride)
        y[b, r, c, channel] = max(x[b, h, w, channel] for h, w in pixels)
    return y


def max_pool_grad(x, g, window, stride):
    """-> gradient of x; among equal maxima, the first in reading order gets it."""
    dx = np.zeros(x.shape)
    for b, r, c, channel in np.ndindex(g.shape):
        pixels = pool_pixels(x, r, c, window, stride)
        values = [x[b, h, w, channel] for h, w in pixels]
        h, w = pixels[values.index(max(values))]
        dx[b, h, w, channel] += g[b, r, c, channel]
    return dx


def avg_pool(x, window, stride):
    """x[B,H,W,C] -> [B,H',W',C], sizes as for max_pool; the mean of the existing pixels."""
    rows, columns = (1 + math.ceil((size - window) / stride) for size in x.shape[1:3])
    y = np.zeros((x.shape[0], rows, columns, x.shape[3]))
    for b, r, c, channel in np.ndindex(y.shape):
        pixels = pool_pixels(x, r, c, window, stride)
        y[b, r, c, channel] = sum(x[b, h, w, channel] for h, w in pixels) / len(pixels)
    return y


def avg_pool_grad(x, g, window, stride):
    """-> gradient of x."""
    dx = np.zeros(x.shape)
    for b, r, c, channel in np.ndindex(g.shape):
        pixels = pool_pixels(x, r, c, window, stride)
        for h, w in pixels:
            dx[b, h, w, channel] += g[b, r, c, channel] / len(pixels)
    return dx


def local(x, kernel, bias):
    """x[B,H,W,C], kernel[H,W,k*k*C,O], bias[H,W,O] -> [B,H,W,O]: separate weights at each position."""
    (height, width, channels), units = x.shape[1:], kernel.shape[3]
    size = math.isqrt(kernel.shape[2] // channels)
    y = np.zeros((*x.shape[:3], units)) + bias
    for b, h, w, o in np.ndindex(y.shape):
        for i, j, c in np.ndindex(size, size, channels):
            row, column = h + i - size // 2, w + j - size // 2
            if 0 <= row < height and 0 <= column < width:
                y[b, h, w, o] += (
                    x[b, row, column, c] * kernel[h, w, (i * size + j) * channels + c, o]
                )
    return y


def pool_pixels(x, row, column, window, stride):
    """The existing pixels in the window of output (row, column), in reading order."""
    top, left = row * stride, column * stride
    return [
        (h, w)
        for h in range(top, min(top + window, x.shape[1]))
        for w in range(left, min(left + window, x.shape[2]))
    ]
