"""What is wrong with a training: where numbers stopped being finite, and a loss that does not move."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from alexnet_jax.nets.network import Network
from alexnet_jax.training import steps

STUCK = 0.005  # of ln(classes): how near to it a loss counts as one that has learnt nothing
CAUSES = (
    'likely causes: a rate that is too high (config.optim.rate) or too high at the start '
    '(config.optim.warmup), larger initial values than the preset has (config.model.std), bfloat16'
)
HINT = (
    'likely causes: initial values too small for the depth or width (for AlexNet, config.model.std; '
    'configs/original.py has 0.03 in conv3 to conv5), a rate that is too low or too high '
    '(config.optim.rate), labels that do not belong to the pictures (python -m experiments.show_views)'
)


def make_find_broken(
    net: Network, *, seed: int, freeze: Sequence[str] = (), **inputs_of
) -> Callable:
    """find_broken(variables, step, batch, rates) -> where a training step stopped being finite.

    On any mesh; freeze and inputs_of: see `steps.make_train_step`. Without a step it looks at the
    variables alone.
    """
    inputs = steps.make_inputs(**inputs_of)

    @jax.jit
    def of_step(variables, step, batch, rates):
        x, labels = inputs(batch, rates), batch['label']
        rows = jnp.arange(len(labels))

        def loss(params):
            with_stats = {**variables, 'params': params}
            losses, logits, out, _ = steps.apply_loss(
                net, with_stats, x, labels, seed, step, rows, freeze
            )
            return jnp.mean(losses), {**out, net.names[-1]: logits}

        gradients, out = jax.grad(loss, has_aux=True)(variables['params'])
        return {'activations': _finite(out), 'gradients': _finite(gradients)}

    def find_broken(variables, *step):
        found = {name: jax.jit(_finite)(tree) for name, tree in variables.items()}
        return first_broken(net, {**found, **(of_step(variables, *step) if step else {})})

    return find_broken


def _finite(layers: dict) -> dict[str, jax.Array]:
    """Whether all numbers of each layer are finite, bool[] by name."""
    return {name: steps.all_finite(arrays) for name, arrays in layers.items()}


def first_broken(net: Network, finite: dict[str, dict[str, bool]]) -> str:
    """Where it began, from which params, batch_stats, activations and gradients are finite."""
    order = {name: i for i, name in enumerate(net.names)}
    bad = {
        kind: sorted((n for n in found if not found[n]), key=lambda n: order.get(n, len(order)))
        for kind, found in finite.items()
    }
    # A gradient that is not finite makes those of all layers below it so, too: the last is the first.
    if bad['params']:
        return f'the gradient of {bad["params"][-1]} broke first, in the step before'
    if bad.get('batch_stats'):
        return f'the running statistics of {bad["batch_stats"][0]} broke first, in the step before'
    if bad.get('activations'):
        return f'the activations {bad["activations"][0]} broke first'
    if bad.get('gradients'):
        return f'the gradient of {bad["gradients"][-1]} broke first'
    return 'everything is finite when the step is computed again: it may be the hardware'


class Stuck:
    """stuck(loss of an interval, its steps) -> True once, after `limit` steps at pure chance."""

    def __init__(self, limit: int, classes: int):
        self.advice = (
            f'for {limit:,} steps the loss has been that of pure chance, ln({classes}) = '
            f'{math.log(classes):.4f}; {HINT}'
        )
        self._limit, self._chance, self._count = limit, math.log(classes), 0

    def __call__(self, loss: float, steps: int) -> bool:
        before = self._count
        near = abs(loss - self._chance) < STUCK * self._chance
        self._count = before + steps if near else 0
        return 0 < self._limit and before < self._limit <= self._count
