"""Diagnoses a training run: saturated units, values that are not finite, a loss that does not move."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from alexnet_jax.nets import network
from alexnet_jax.nets.network import Network
from alexnet_jax.training import steps

STUCK = 0.005  # of ln(classes): a loss within this distance of it has learned nothing
SATURATED = 0.99  # of its bound: a unit's output beyond this has almost no gradient
CAUSES = (
    'likely causes: a learning rate that is too high (config.optim.rate) or too high at the start '
    "(config.optim.warmup), initial values larger than the preset's (config.model.std), bfloat16"
)
HINT = (
    'likely causes: initial values too small for the depth or width (for AlexNet, config.model.std; '
    '`paper` has 0.03 in conv3 to conv5), a learning rate that is too low or too high '
    '(config.optim.rate), labels that do not match the images'
)


def make_find_broken(
    net: Network, *, seed: int, freeze: Sequence[str] = (), smoothing: float = 0.0, **inputs_of
) -> Callable:
    """Returns find_broken(variables, step, batch, rates) -> where a step stopped being finite.

    Works on any mesh; freeze, smoothing and inputs_of: see `steps.make_train_step`. Without a step, it checks
    only the variables.
    """
    inputs = steps.make_inputs(**inputs_of)

    @jax.jit
    def of_step(variables, step, batch, rates):
        x, wanted = inputs(batch, rates), steps.truth(batch, net.classes, smoothing)
        rows = jnp.arange(len(x))

        def loss(params):
            with_stats = {**variables, 'params': params}
            losses, logits, out, _ = steps.apply_loss(
                net, with_stats, x, wanted, seed, step, rows, freeze
            )
            return jnp.mean(losses), {**out, net.names[-1]: logits}

        gradients, out = jax.grad(loss, has_aux=True)(variables['params'])
        return {'activations': _finite(out), 'gradients': _finite(gradients)}

    def find_broken(variables, *step):
        found = {name: jax.jit(_finite)(tree) for name, tree in variables.items()}
        return first_broken(net, {**found, **(of_step(variables, *step) if step else {})})

    return find_broken


def _finite(layers: dict) -> dict[str, jax.Array]:
    """Returns whether all values of each layer are finite, bool[] by name."""
    return {name: steps.all_finite(arrays) for name, arrays in layers.items()}


def first_broken(net: Network, finite: dict[str, dict[str, bool]]) -> str:
    """Says what broke first, given which params, batch_stats, activations and gradients are finite."""
    order = {name: i for i, name in enumerate(net.names)}
    bad = {
        kind: sorted((n for n in found if not found[n]), key=lambda n: order.get(n, len(order)))
        for kind, found in finite.items()
    }
    # A gradient that is not finite spreads to all layers below, so the last bad layer broke first.
    if bad['params']:
        return f'the gradient of {bad["params"][-1]} broke first, in the previous step'
    if bad.get('batch_stats'):
        return (
            f'the running statistics of {bad["batch_stats"][0]} broke first, in the previous step'
        )
    if bad.get('activations'):
        return f'the activations of {bad["activations"][0]} broke first'
    if bad.get('gradients'):
        return f'the gradient of {bad["gradients"][-1]} broke first'
    return 'everything is finite when the step is recomputed: the hardware may be at fault'


def make_saturated(net: Network, **inputs_of) -> Callable:
    """Returns saturated(variables, batch, rates) -> {layer: share of its outputs at `net.bound`}.

    At most 32 images of the batch count. inputs_of: see `steps.make_inputs`.
    """
    inputs = steps.make_inputs(**inputs_of)

    @jax.jit
    def saturated(variables, batch, rates):
        few = {name: x[:32] for name, x in batch.items()}
        _, out, _ = network.apply(net, variables, inputs(few, rates))
        found = {}
        for name, xs in out.items():
            sizes = jnp.abs(jnp.stack(jax.tree.leaves(xs)))
            # layers before the activation exceed the bound
            found[name] = (sizes.max() <= net.bound) * jnp.mean(sizes > SATURATED * net.bound)
        return found

    return saturated


def saturation(shares: dict[str, float]) -> str:
    """Returns a warning if most units of a layer are saturated at the start, else ''."""
    most = {name: share for name, share in shares.items() if share > 0.5}
    if not most:
        return ''
    layers = ', '.join(f'{name} {100 * share:.0f}%' for name, share in most.items())
    return (
        f'most outputs are saturated at the start ({layers}), so gradients vanish; lower the initial '
        'biases and standard deviations (config.model.bias, config.model.std; see paper.py:tanh)'
    )


class Stuck:
    """stuck(loss of an interval, its steps) -> True once, after `limit` steps at chance level."""

    def __init__(self, limit: int, classes: int):
        self.advice = (
            f'the loss has been at chance level, ln({classes}) = {math.log(classes):.4f}, for '
            f'{limit:,} steps; {HINT}'
        )
        self._limit, self._chance, self._count = limit, math.log(classes), 0

    def __call__(self, loss: float, steps: int) -> bool:
        before = self._count
        near = abs(loss - self._chance) < STUCK * self._chance
        self._count = before + steps if near else 0
        return 0 < self._limit and before < self._limit <= self._count
