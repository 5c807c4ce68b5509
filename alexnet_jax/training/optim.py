"""The paper's SGD, LARS, RMSProp, and all learning rates as one pure function on the host."""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from alexnet_jax.common.errors import UserError, choose
from alexnet_jax.nets import network
from alexnet_jax.nets.network import Network

NAMES = ('sgd', 'lars', 'rmsprop')
ROLES = ('kernel', 'depthwise', 'scale', 'bias')  # of parameters, see `Network.role`


def make(
    net: Network,
    *,
    momentum: float,
    decay: float,
    name: str = 'sgd',
    trust: float = 0.001,
    decays: tuple[tuple[str, float], ...] = (),
    decay_roles: tuple[str, ...] = ('kernel', 'depthwise'),
    nesterov: bool = False,
    rms_decay: float = 0.9,
    rms_epsilon: float = 1.0,
    clip: float = 0.0,
    freeze: tuple[str, ...] = (),
    axis: str | None = None,
):
    """Returns the optimizer `config.optim.name` for a network's parameters; 'sgd' is that of §5:

        v <- momentum * v - decay * rate * w - rate * gradient;  w <- w + v

    The rate is inside the velocity, so a new rate does not rescale it. The update takes the rates of
    `make_rates`, at least 'weights', 'biases' and 'conv1', as `rates`; at rate 0, and in the layers of
    `freeze`, neither parameter nor velocity changes. decay_roles: the roles of parameters with weight
    decay; decays: ((layer, decay), ...) for layers with their own. axis: the mesh axis that divides the
    network; None if each device has all of it.
    """
    betas = functools.partial(_betas, net, decay, decays, decay_roles)
    parts = [_clip(net, clip, freeze, axis)] if clip else []
    if name == 'lars':
        parts.append(_scale_by_trust(net, trust, betas, axis))
    else:
        parts.append(_add_decay(betas))
    if name == 'rmsprop':
        # TensorFlow's: epsilon inside the root, an accumulator that starts at 1.
        parts.append(optax.scale_by_rms(rms_decay, rms_epsilon, 1.0, eps_in_sqrt=True))
    parts += [_scale_by_rates(net, freeze), optax.trace(momentum, nesterov)]
    return _hold_where_rate_is_zero(net, optax.chain(*parts), freeze)


def _clip(net, most, freeze, axis):
    """Scales the gradient of all layers together, over all towers, to a norm of at most `most`."""

    def clip(gradients, params):
        del params
        leaves = jax.tree_util.tree_leaves_with_path(gradients)
        squares = [
            _squares(net, path, g, axis)
            for path, g in leaves
            if not network.inside(network.names_of(path), freeze)
        ]
        norm = jnp.sqrt(sum(squares))
        factor = jnp.where(norm > most, most / norm, 1.0)
        return jax.tree.map(lambda g: factor * g, gradients)

    return optax.stateless(clip)


def _squares(net, path, x, axis):
    """Returns the sum of a leaf's squares over all its parts on the mesh."""
    squares = jnp.sum(jnp.square(x))
    divided = axis is not None and axis in tuple(net.partition(network.names_of(path)))
    return lax.psum(squares, axis) if divided else squares


def _add_decay(betas):
    """Adds weight decay to the gradients. Kernels decay, biases do not (`docs/original.md` §4)."""

    def add(gradients, params):
        return jax.tree.map(
            lambda beta, g, w: g + beta * w if beta else g, betas(params), gradients, params
        )

    return optax.stateless(add)


def _scale_by_trust(net, trust, betas, axis):
    """LARS: first scales the gradient to a fixed fraction of each parameter's norm.

        gradient <- trust * |w| / (|gradient| + decay * |w|) * (gradient + decay * w)

    You, Gitman, Ginsburg 2017, "Large Batch Training of Convolutional Networks". A layer's kernel,
    over all towers, and its bias each have their own norm; if |w| or |gradient| is 0, the factor is
    1; both as in the authors' code (NVIDIA/caffe, c49eb1b6). Unlike theirs, our biases do not decay.
    """

    # Not optax.scale_by_trust_ratio: its norms cover only one device's towers, and it divides by
    # |gradient + decay * w|.
    def scale(path, beta, gradient, w):
        size, slope = (jnp.sqrt(_squares(net, path, x, axis)) for x in (w, gradient))
        ratio = trust * size / (slope + beta * size)
        ratio = jnp.where((size > 0) & (slope > 0), ratio, 1.0)
        return ratio * (gradient + beta * w)

    def update(gradients, params):
        return jax.tree.map_with_path(scale, betas(params), gradients, params)

    return optax.stateless(update)


def _betas(net, decay, decays, roles, params):
    """Returns the weight decay of every parameter, in a tree like that of the parameters."""

    def beta(path, _):
        names = network.names_of(path)
        if net.role(names) not in roles:
            return 0.0
        return next(
            (own for layer, own in reversed(decays) if network.inside(names, (layer,))), decay
        )

    return jax.tree.map_with_path(beta, params)


def _rate_tree(net, params, rates, freeze):
    """Returns the learning rate of every parameter, in a tree like that of the parameters."""

    def rate(path, _):
        names = network.names_of(path)
        bias = net.role(names) == 'bias'
        if network.inside(names, freeze):
            return jnp.zeros_like(rates['weights'])
        if network.inside(names, net.first):  # frozen kernels freeze their biases too
            biases = jnp.where(rates['conv1'] > 0, rates['biases'], 0.0)
            return biases if bias else rates['conv1']
        return rates['biases'] if bias else rates['weights']

    return jax.tree.map_with_path(rate, params)


def _scale_by_rates(net, freeze):
    def update(updates, state, params, *, rates, **_):
        tree = _rate_tree(net, params, rates, freeze)
        return jax.tree.map(lambda r, u: -r * u, tree, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _hold_where_rate_is_zero(net, inner, freeze):
    """As in the 2012 source code, updates nothing at rate 0: no decay, and no momentum either."""

    def update(updates, state, params, *, rates, **_):
        tree = _rate_tree(net, params, rates, freeze)

        def held(new, old):
            return jax.tree.map(lambda r, n, o: jnp.where(r > 0, n, o), tree, new, old)

        new_updates, new_state = inner.update(updates, state, params, rates=rates)
        new_updates = held(new_updates, jax.tree.map(jnp.zeros_like, updates))
        # Hold every part of the state that is shaped like the parameters, such as the velocity.
        new_state = jax.tree.map(
            lambda new, old: held(new, old) if _like(new, params) else new,
            new_state,
            state,
            is_leaf=lambda x: _like(x, params),
        )
        return new_updates, new_state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _like(x: Any, params) -> bool:
    return jax.tree.structure(x) == jax.tree.structure(params)


def velocity(opt_state) -> dict:
    """Returns the velocity from the state of an optimizer made by `make`, in a tree like the parameters."""
    return next(s.trace for s in opt_state if isinstance(s, optax.TraceState))


def steps_per(epochs: float, examples: int, batch: int) -> int:
    """Returns the first step after `epochs` epochs: ceil(epochs * examples / batch)."""
    return math.ceil(epochs * examples / batch - 1e-9)  # less than any real fraction of a step


def scalars(rates: Mapping[str, float]) -> dict[str, np.float32]:
    """Returns one step's rates from `make_rates` in the form that a train step takes."""
    return {name: np.float32(value) for name, value in rates.items() if name != 'stop'}


def make_rates(
    *,
    examples: int,
    batch: int,
    name: str,
    momentum: float,
    decay: float,
    decays: tuple[tuple[str, float], ...],
    decay_roles: tuple[str, ...],
    nesterov: bool,
    rms_decay: float,
    rms_epsilon: float,
    clip: float,
    trust: float,
    rate: float,
    bias_factor: float,
    bias_drops: bool,
    bias_final: float,
    schedule: str,
    factor: float,
    epochs: float,
    drops: tuple[float, ...],
    power: float,
    drop_every: float,
    patience: float,
    threshold: float,
    max_drops: int,
    warmup: float,
    conv1: tuple[tuple[float, float], ...],
    colour_off: float,
) -> Callable[[int, Mapping[int, float]], dict[str, float]]:
    """Returns rates(step, history) -> {weights, biases, conv1, colour, stop} of `config.optim`.

    rates is a pure function on the host. step: the number of updates made; history: {step: top-1
    error, %} of the evaluations so far; colour is 1 or 0; stop is True when the run is over. Raises
    UserError for invalid values, including those only `make` uses: it is called too late to check.
    """
    del decay, nesterov  # used by the update, not by the rates
    choose('config.optim.name', name, NAMES)
    for field, value, fits, range_ in (
        ('momentum', momentum, 0 <= momentum < 1, 'at least 0 and below 1'),
        ('factor', factor, 0 < factor <= 1, 'above 0 and at most 1'),
        ('epochs', epochs, epochs > 0, 'above 0'),
        ('warmup', warmup, warmup < epochs, f'below config.optim.epochs={epochs}'),
        ('drop_every', drop_every, drop_every > 0, 'above 0'),
        ('rms_decay', rms_decay, 0 <= rms_decay < 1, 'at least 0 and below 1'),
        ('rms_epsilon', rms_epsilon, rms_epsilon > 0, 'above 0'),
        ('clip', clip, clip >= 0, 'at least 0'),
    ):
        if not fits:
            raise UserError(f'config.optim.{field}={value}: must be {range_}')
    if name == 'lars' and trust <= 0:
        raise UserError(f'config.optim.trust={trust}: must be above 0')
    for role in decay_roles:
        choose('config.optim.decay_roles', role, ROLES)

    def at(e):
        return steps_per(e, examples, batch)

    total, warm = at(epochs), at(warmup)
    try:
        boundaries = [at(e) for e in drops]
        conv1 = [(at(epoch), float(value)) for epoch, value in conv1]
    except (TypeError, ValueError) as error:
        raise UserError(
            f'config.optim.drops={drops} must be epochs, as in (25.0, 51.0), and config.optim.conv1='
            f'{conv1} must be pairs of an epoch and a rate, as in ((67.0, 1e-5), (72.0, 0.0))'
        ) from error
    for field, numbers in (('drops', boundaries), ('conv1', itertools.chain(*conv1))):
        if any(number < 0 for number in numbers):
            raise UserError(f'config.optim.{field}: must not have negative numbers')

    for pair in decays:
        match pair:
            case (str(), int() | float() as beta) if beta >= 0:
                pass
            case _:
                raise UserError(
                    f'config.optim.decays={decays}: must be pairs of a layer and a weight decay >= 0, '
                    "as in (('fc8', 0.001),)"
                )

    # Each schedule returns the remaining fraction of the rate, whether the last drop has been made,
    # and whether the run is over.
    def by_epoch(step, history):
        count = sum(step >= b for b in boundaries)
        return factor**count, count == len(boundaries), False

    def by_plateau(step, history):
        """Drops the rate when the validation error stops improving, and finally ends the run (§5)."""
        count, best, since = 0, float('inf'), 0
        for s in sorted(s for s in history if s <= step):
            if best - history[s] > threshold - 1e-9:  # exactly the threshold counts, too
                best, since = history[s], s
            elif s - since > patience * examples / batch - 1:  # steps are whole, epochs are not
                count, since = count + 1, s
        return factor ** min(count, max_drops), count >= max_drops, count > max_drops

    def by_power(step, history, power=power):
        return (1 - step / total) ** power if step < total else 0.0, False, False

    def by_cosine(step, history):
        """Half a cosine from the end of the warm-up on (Loshchilov and Hutter, 2017)."""
        part = min(max(step - warm, 0) / max(total - warm, 1), 1.0)
        return (1 + math.cos(math.pi * part)) / 2, False, False

    def by_factor(step, history):
        number = math.floor(step * batch / (drop_every * examples) + 1e-9)
        return factor**number, False, False

    schedules = {
        'steps': by_epoch,
        'plateau': by_plateau,
        'poly': by_power,
        'linear': functools.partial(by_power, power=1.0),
        'cosine': by_cosine,
        'exponential': by_factor,
    }
    choose('config.optim.schedule', schedule, schedules)

    def rates(step: int, history: Mapping[int, float]) -> dict[str, float]:
        left, final, over = schedules[schedule](step, history)
        ramp = min(1.0, (step + 1) / warm) if warm else 1.0
        weights = rate * left * ramp
        biases = bias_factor * (weights if bias_drops else rate * ramp)
        if bias_final and final:
            biases = bias_final
        first = weights
        for since, value in conv1:
            if step >= since:
                first = value
        return {
            'weights': weights,
            'biases': biases,
            'conv1': first,
            'colour': 0.0 if colour_off and step >= at(colour_off) else 1.0,
            'stop': over or step >= total,
        }

    return rates


_fields = {*inspect.signature(make_rates).parameters} - {'examples', 'batch'}
UPDATE = _fields & {
    *inspect.signature(make).parameters
}  # fields of `config.optim` that `make` takes
SCHEDULE = _fields - UPDATE  # those that determine only the rates
