"""The network's operations on the arrays of one tower, and the exchange between towers.

Arrays are NHWC: B images, H rows, W columns, C channels. Section numbers refer to the paper
(Krizhevsky, Sutskever, Hinton, 2012); "the source" is its 2012 source code, released in 2025.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from alexnet_jax.common.errors import InputError
from alexnet_jax.devices.backend import choices
from alexnet_jax.nets.network import Training, inside

Padding = tuple[tuple[int, int], tuple[int, int]]
LRN = 'alexnet_jax.lrn'  # the name of local response normalization in an exported graph


def conv(
    x, kernel, bias=None, *, stride: int = 1, padding: Padding = ((0, 0), (0, 0))
) -> jax.Array:
    """Cross-correlates and adds a bias, if any.

    x[B,H,W,C], kernel[k,k,C,O], bias[O] -> [B,H',W',O]; padding is ((top, bottom), (left, right)) in
    pixels. The source's first layer pads ((0, 3), (0, 3)): its last window extends 3 pixels beyond
    the right and lower edges of the 224-pixel crop.
    """
    alone = kernel.shape[:2] == (1, 1) and stride == 1 and padding == ((0, 0), (0, 0))
    if alone and choices().products:
        y = jnp.matmul(x, kernel[0, 0])
    else:
        y = lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )
    return y if bias is None else add(y, bias.reshape(1, 1, 1, -1))


def depthwise(x, kernel, *, stride: int = 1, padding: Padding = ((0, 0), (0, 0))) -> jax.Array:
    """Cross-correlates each channel with its own kernel: x[B,H,W,C], kernel[k,k,C] -> [B,H',W',C].

    On CPUs as shifted products (`backend.py`); both forms are exact.
    """
    if not choices().shifts:
        return lax.conv_general_dilated(
            x,
            kernel[:, :, None],
            (stride, stride),
            padding,
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            feature_group_count=x.shape[-1],
        )
    # Adding zeros lets the kernel vary over the mesh like x, so that its gradients are summed.
    return _shifted(x, kernel + jnp.zeros_like(x[:1, :1, 0]), stride, padding)


def _shifts(x, kernel, stride: int, padding: Padding):
    size = kernel.shape[0]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    out = [(n - size) // stride + 1 for n in x.shape[1:3]]
    total = 0.0
    for i in range(size):
        for j in range(size):
            ends = (x.shape[0], i + (out[0] - 1) * stride + 1, j + (out[1] - 1) * stride + 1)
            view = lax.slice(x, (0, i, j, 0), (*ends, x.shape[3]), (1, stride, stride, 1))
            total = total + view * kernel[None, None, i : i + 1, j]
    return total


_shifted = jax.custom_vjp(_shifts, nondiff_argnums=(2, 3))


# The custom gradient sums the gradient of the kernel over a few images at a time, which stay in the cache:
# several times as fast as over the whole batch, once per shift.
def _shifted_forward(x, kernel, stride, padding):
    return _shifted(x, kernel, stride, padding), (x, kernel)


def _shifted_backward(stride, padding, residual, g):
    x, kernel = residual

    def of_kernel(images):
        x, g = images
        return jax.vjp(lambda kernel: _shifts(x, kernel, stride, padding), kernel)[1](g)[0]

    few = math.gcd(len(x), 4)
    parts = [one.reshape(-1, few, *one.shape[1:]) for one in (x, g)]
    return _unshifted(g, kernel, x.shape, stride, padding), lax.map(of_kernel, parts).sum(0)


def _unshifted(g, kernel, shape, stride: int, padding: Padding):
    """The gradient of x, of this shape: g, with zeros between its pixels, times the rotated kernel."""
    size = kernel.shape[0]
    pads = [(0, 0, 0)]
    for n, m, (before, _) in zip(shape[1:3], g.shape[1:3], padding, strict=True):
        pads.append((size - 1 - before, n + before - 1 - (m - 1) * stride, stride - 1))
    g = lax.pad(g, jnp.zeros((), g.dtype), (*pads, (0, 0, 0)))
    return _shifts(g, kernel[::-1, ::-1], 1, ((0, 0), (0, 0)))


_shifted.defvjp(_shifted_forward, _shifted_backward)


def local(x, kernel, bias) -> jax.Array:
    """A locally connected layer: a convolution with separate weights and biases at each position.

    x[B,H,W,C], kernel[H,W,k*k*C,O] with rows in the order (row, column, channel), bias[H,W,O]
    -> [B,H,W,O]; stride 1, zero padding that keeps the size (`docs/original.md` §8).
    """
    height, width, channels = x.shape[1:]
    size = round((kernel.shape[2] // channels) ** 0.5)
    padded = jnp.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    views = [padded[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
    return add(jnp.einsum('bhwi,hwio->bhwo', jnp.concatenate(views, axis=-1), kernel), bias[None])


def dense(x, kernel, bias=None, *, dtype=None) -> jax.Array:
    """x[B,I], kernel[I,O], bias[O] or None -> [B,O]; all can have a leading tower axis.

    dtype: of the result; None: that of x. A wider result is never rounded to the dtype of x.
    """
    y = jnp.matmul(x, kernel, preferred_element_type=dtype)
    return y if bias is None else add(y, bias[..., None, :])


def add(y, bias) -> jax.Array:
    """y + bias in the dtype of y, added in the dtype of the bias if that is wider.

    The gradient of the bias is then summed in the wider dtype: in bfloat16 a long sum stops growing
    once an addend is less than half a unit in its last place.
    """
    return (y + bias).astype(y.dtype)


def lrn(x, *, alpha: float, k: float, n: int, beta: float) -> jax.Array:
    """Local response normalization across n neighboring channels (§3.3); n is odd.

    x[B,H,W,C] -> x / (k + alpha * sum of x² over channels i-n//2..i+n//2)^beta, the window clipped
    at the first and last channel. alpha multiplies each square: the source's `scale` of 1e-4 is an
    alpha of 1e-4 / 5 here.
    """
    function = lax.composite(_lrn, LRN) if choices().sums else _lrn
    return function(x, alpha=alpha, k=k, n=n, beta=beta)


def _lrn(x, *, alpha, k, n, beta):
    total = functools.partial(_window_sum, axes=(3,))
    if choices().band and x.dtype == jnp.bfloat16:
        total = _band_sum
    return _normalize(functools.partial(total, n=n), alpha, k, beta, choices().barrier, x)


def map_norm(x, *, alpha: float, k: float, n: int, beta: float) -> jax.Array:
    """The same normalization over an n x n square of each channel's own map, clipped at its borders.

    x[B,H,W,C] -> [B,H,W,C]. The source has it in layer 2; the paper does not mention it.
    """
    total = functools.partial(_window_sum, n=n, axes=(1, 2))
    return _normalize(total, alpha, k, beta, choices().barrier, x)


def _window_sum(x, n: int, axes: tuple[int, ...]):
    if choices().sums and axes == (1, 2):
        return _reduce(x, n, 1, lax.add, 0.0, ((n // 2,) * 2,) * 2)
    for axis in axes:
        pad = [(0, 0)] * x.ndim
        pad[axis] = (n // 2, n // 2)
        size, padded = x.shape[axis], jnp.pad(x, pad)
        x = sum(lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(n))
    return x


def _band_sum(x, n: int):
    """The sum over n neighboring channels, of terms rounded to bfloat16, as a 1 x 1 convolution."""
    places = np.arange(x.shape[3])
    band = abs(places[:, None] - places) <= n // 2
    return lax.conv_general_dilated(
        x.astype(jnp.bfloat16),
        jnp.asarray(band, jnp.bfloat16)[None, None],
        (1, 1),
        'VALID',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        preferred_element_type=x.dtype,
    )


def wide(dtype):
    """A dtype, but at least float32."""
    return jnp.promote_types(jnp.float32, dtype)


def _wide(x):
    """Converts to at least float32: in bfloat16 the denominator, near 2, would have steps of 1/64."""
    return x.astype(wide(x.dtype))


def _powers(s, beta: float):
    """s^-beta and 1/s; for the paper's beta of 0.75 from square roots, many times faster than a power."""
    if beta == 0.75:
        r = lax.rsqrt(s)
        return r * jnp.sqrt(r), r * r
    return s**-beta, 1 / s


# The custom gradient recomputes the denominator instead of storing it, and exploits what autodiff does
# not know: the adjoint of a symmetric window sum is the same window sum.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _normalize(window_sum: Callable, alpha: float, k: float, beta: float, barrier: bool, x):
    wide = _wide(x)
    return (wide * _powers(k + alpha * window_sum(wide * wide), beta)[0]).astype(x.dtype)


def _normalize_forward(window_sum, alpha, k, beta, barrier, x):
    return _normalize(window_sum, alpha, k, beta, barrier, x), x


def _normalize_backward(window_sum, alpha, k, beta, barrier, x, g):
    if barrier:
        x = lax.optimization_barrier(x)
    wide = _wide(x)
    scale, inverse = _powers(k + alpha * window_sum(wide * wide), beta)
    scaled = g * scale
    terms = scaled * wide * inverse
    if barrier:
        terms = _wide(lax.optimization_barrier(terms.astype(x.dtype)))
    return ((scaled - 2 * alpha * beta * wide * window_sum(terms)).astype(x.dtype),)


_normalize.defvjp(_normalize_forward, _normalize_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(x, window: int, stride: int, form: str):
    slices = _pool_slices(x, window, stride, -jnp.inf)
    return functools.reduce(jnp.maximum, slices)


def max_pool(x, *, window: int, stride: int) -> jax.Array:
    """Max pooling in ceil mode, as in the source.

    x[B,H,W,C] -> [B,H',W',C], H' = 1 + ceil((H - window) / stride); windows that extend beyond the
    lower and right edges use the pixels that exist. Among equal maxima, the first in reading order
    gets the gradient (in the source, each of them gets it).
    """
    if choices().operators:
        return _reduce(x, window, stride, lax.max, -jnp.inf, _ends(x, window, stride))
    return _max_pool(x, window, stride, choices().pooling)


def _reduce(x, window: int, stride: int, function: Callable, start: float, padding: Padding):
    """Reduces windows with one operator; its gradient is slow on CPUs."""
    start = np.array(start, x.dtype)[()]
    sizes, steps = (1, window, window, 1), (1, stride, stride, 1)
    return lax.reduce_window(x, start, function, sizes, steps, ((0, 0), *padding, (0, 0)))


def _ends(x, window: int, stride: int) -> Padding:
    """The padding of `max_pool` and `avg_pool`."""
    sizes = x.shape[1:3]
    ends = ((_pool_size(n, window, stride) - 1) * stride + window - n for n in sizes)
    return tuple((0, max(end, 0)) for end in ends)


def _pool_size(size: int, window: int, stride: int) -> int:
    pooled = 1 + -((window - size) // stride)
    if pooled < 1:
        raise InputError(
            f'nothing is left of feature maps of {size} x {size} pixels after pooling; use larger crops'
        )
    return pooled


def avg_pool(x, *, window: int, stride: int) -> jax.Array:
    """Average pooling in ceil mode, as in the source, over the pixels of each window that exist.

    x[B,H,W,C] -> [B,H',W',C], with the sizes of `max_pool` (`docs/original.md` §1).
    """
    count = sum(_pool_slices(jnp.ones((1, *x.shape[1:3], 1), x.dtype), window, stride, 0))
    if choices().sums:
        return _reduce(x, window, stride, lax.add, 0.0, _ends(x, window, stride)) / count
    return sum(_pool_slices(x, window, stride, 0)) / count


def _pool_slices(x, window, stride, fill):
    """Yields the window² shifted views of x in reading order, each [B,H',W',C].

    fill: the value beyond the lower and right edges.
    """
    out = [_pool_size(size, window, stride) for size in x.shape[1:3]]
    ends = [(n - 1) * stride + window - size for n, size in zip(out, x.shape[1:3], strict=True)]
    pads = ((0, 0, 0), (0, ends[0], 0), (0, ends[1], 0), (0, 0, 0))
    x = lax.pad(x, jnp.array(fill, x.dtype), pads)  # a negative end crops unused pixels
    for i in range(window):
        for j in range(window):
            limits = (x.shape[0], i + (out[0] - 1) * stride + 1, j + (out[1] - 1) * stride + 1)
            yield lax.slice(x, (0, i, j, 0), (*limits, x.shape[3]), (1, stride, stride, 1))


# The custom gradient stores the index of the winner, one byte per output: many times faster on CPUs than
# the compiler's select-and-scatter, and deterministic on GPUs.
def _max_pool_forward(x, window, stride, form):
    best, winner = None, None
    for index, view in enumerate(_pool_slices(x, window, stride, -jnp.inf)):
        if best is None:
            best, winner = view, jnp.zeros_like(view, dtype=jnp.uint8)
        else:
            winner = jnp.where(view > best, jnp.uint8(index), winner)
            best = jnp.maximum(best, view)
    return best, (winner, x)  # only the shape of x is used: the compiler drops the rest


def _max_pool_backward(window, stride, form, residual, g):
    winner, x = residual
    if form == 'window':
        parts = [jnp.where(winner == i, g, jnp.zeros((), g.dtype)) for i in range(window * window)]
        places = [divmod(i, window) for i in range(window * window)]
        return (_spread(parts, places, x.shape, stride),)
    batch, height, width, channels = x.shape
    # Pixel stride * a + p is at offset p + stride * d of window a - d. So the pixels with the same p are
    # a sum of whole arrays.
    before = -(-window // stride) - 1
    cells = [-(-n // stride) for n in (height, width)]
    pads = [(before, max(n - m, 0)) for n, m in zip(cells, g.shape[1:3], strict=True)]
    g = jnp.pad(g, ((0, 0), *pads, (0, 0)))
    winner = jnp.pad(winner, ((0, 0), *pads, (0, 0)), constant_values=window * window)  # no winner

    def window_of(x, down, right):
        y0, x0 = before - down, before - right
        return x[:, y0 : y0 + cells[0], x0 : x0 + cells[1]]

    def pixels(p, q):
        parts = [
            jnp.where(
                window_of(winner, i // stride, j // stride) == i * window + j,
                window_of(g, i // stride, j // stride),
                jnp.zeros((), g.dtype),
            )
            for i in range(p, window, stride)
            for j in range(q, window, stride)
        ]
        return sum(parts) if parts else jnp.zeros_like(window_of(g, 0, 0))

    places = [(p, q) for p in range(stride) for q in range(stride)]
    if form == 'spread':
        return (_spread([pixels(*place) for place in places], places, x.shape, stride),)
    rows = [jnp.stack([pixels(p, q) for q in range(stride)], axis=3) for p in range(stride)]
    whole = jnp.stack(rows, axis=2).reshape(batch, cells[0] * stride, cells[1] * stride, channels)
    return (whole[:, :height, :width],)


def _spread(parts, places, shape, stride: int):
    """The sum of arrays [B,H',W',C] with zeros between pixels, each starting at its place (row, column)."""
    total = 0
    for part, place in zip(parts, places, strict=True):
        pads = [
            (before, size - before - (count - 1) * stride - 1, stride - 1)
            for before, size, count in zip(place, shape[1:3], part.shape[1:3], strict=True)
        ]
        zero = jnp.zeros((), part.dtype)
        total = total + lax.pad(part, zero, ((0, 0, 0), *pads, (0, 0, 0)))
    return total


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def dropout(x, rate: float, train: Training | None, *, layer: int = 0, tower=0) -> jax.Array:
    """Zeroes each value with probability `rate` in training, and divides the others by 1 - rate.

    x[B,...] -> the same shape. layer: its index among those with dropout; rows and tower: see
    `dropout_mask`.
    """
    if train is None or not rate:
        return x
    key = jax.random.fold_in(train.key, layer)
    if rate == 0.5:
        units = math.prod(x.shape[1:])
        keep = dropout_mask(key, train.rows, tower, units).reshape(x.shape)
    else:
        draw = functools.partial(jax.random.bernoulli, p=1 - rate, shape=x.shape[1:])
        keep = jax.vmap(lambda row: draw(_row_key(key, row, tower)))(train.rows)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros_like(x))


def _row_key(key, row, tower):
    return jax.random.fold_in(jax.random.fold_in(key, row), tower)


def dropout_mask(key, rows, tower, units: int) -> jax.Array:
    """Which units to keep, each with probability 1/2 (§4.2): bool[B,units].

    rows i32[B]: the images' rows in the global batch; tower: its index in the whole network. Both are
    folded into the key, so that the mask of an image does not depend on the devices.
    """

    def words(row):
        return jax.random.bits(_row_key(key, row, tower), (-(-units // 32),), jnp.uint32)

    # One random bit per unit: 32 times less work than one uniform number per unit.
    bits = jax.vmap(words)(rows)[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :]
    return (bits & 1).astype(bool).reshape(rows.shape[0], -1)[:, :units]


def exchange(towers: tuple[jax.Array, ...], axis: str | None = None) -> jax.Array:
    """Concatenates the channels of all towers in tower order: n x [B,...,C] -> [B,...,T*C].

    towers: those of this device; axis: the mesh axis that has the others, if any.
    """
    x = jnp.concatenate(towers, axis=-1) if len(towers) > 1 else towers[0]
    return lax.all_gather(x, axis, axis=x.ndim - 1, tiled=True) if axis else x


class BatchNorm(nn.Module):
    """Batch normalization over the global batch (Ioffe and Szegedy, 2015).

    x [B,...,C], or a tuple with one such array per tower of this device -> the same shapes. Towers are
    normalized independently; parameters and statistics then have a leading tower axis. Training uses
    the mean and the biased variance of the batch, and updates the running ones: running = momentum *
    running + (1 - momentum) * batch (Flax's convention; PyTorch's `momentum` is 1 - ours, and its
    running variance is unbiased). Test time and frozen layers use the running ones. All statistics
    are float32.

    data_axis: the mesh axis that shards the batch; None if each device has the whole batch.
    """

    # Not nn.BatchNorm, which has no axis for towers, no frozen layers, and a momentum that cannot change.
    data_axis: str | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x, train: Training | None = None):
        xs = x if isinstance(x, tuple) else (x,)
        channels = xs[0].shape[-1]
        shape = (len(xs), channels) if isinstance(x, tuple) else (channels,)
        scale = self.param('scale', nn.initializers.ones, shape).reshape(len(xs), -1)
        bias = self.param('bias', nn.initializers.zeros, shape).reshape(len(xs), -1)
        mean = self.variable('batch_stats', 'mean', jnp.zeros, shape, jnp.float32)
        var = self.variable('batch_stats', 'var', jnp.ones, shape, jnp.float32)
        sums = [_wide(one) for one in xs]
        means, variances = (v.value.reshape(len(xs), -1) for v in (mean, var))
        if train is not None and not inside(self.path, train.frozen):
            means, squares = (
                jnp.stack([jnp.mean(one**power, axis=range(one.ndim - 1)) for one in sums])
                for power in (1, 2)
            )
            if self.data_axis:
                means, squares = lax.pmean((means, squares), self.data_axis)
            variances = jnp.maximum(squares - means**2, 0)
            momentum = self.momentum if train.momentum is None else train.momentum
            for running, batch in ((mean, means), (var, variances)):
                new = momentum * running.value + (1 - momentum) * batch.reshape(shape)
                running.value = new.astype(running.value.dtype)

        def normalize(x, mean, variance, scale, bias):
            place = (1,) * (x.ndim - 1) + (-1,)
            factor = lax.rsqrt(variance + self.epsilon) * scale
            return (x - mean.reshape(place)) * factor.reshape(place) + bias.reshape(place)

        each = zip(xs, map(normalize, sums, means, variances, scale, bias), strict=True)
        normalized = tuple(y.astype(one.dtype) for one, y in each)
        return normalized if isinstance(x, tuple) else normalized[0]
