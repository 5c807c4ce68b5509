"""The networks in float64 compared with torchvision's and Keras's, with random normalizations.

Logits in test and training mode, gradients of all parameters, and running statistics after one training step.
"""

import importlib
import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.common import configfile
from alexnet_jax.nets import network
from alexnet_jax.nets.build import build
from alexnet_jax.weights import torch as from_torch
from alexnet_jax.weights import variables

pytestmark = pytest.mark.deploy
BATCH, SIDE, CLASSES = 4, 64, 10
TOLERANCE = 1e-9


def make(preset, **changes):
    model = {**configfile.load(preset).model, 'dtype': 'float64', 'dropout': 0.0, 'input_std': 1.0}
    fields = configfile.load(preset).model
    model = {name: value for name, value in model.items() if name in fields}
    return build(classes=CLASSES, **{**model, **changes})


def images():
    return np.random.default_rng(0).normal(size=(BATCH, SIDE, SIDE, 3))


def random_norms(rng, name, value):
    """Random values in place of those of a fresh normalization."""
    if name in ('gamma', 'weight'):
        return rng.uniform(0.5, 1.5, value.shape)
    if name in ('moving_variance', 'running_var'):
        return rng.uniform(0.5, 2.0, value.shape)
    return rng.normal(0, 0.3, value.shape)


def ours(net, variables, x, weights):
    """-> logits in test mode, in training mode, gradients of the sum of weights * logits, statistics."""
    train = network.Training(jax.random.key(0), jnp.arange(BATCH))

    @jax.jit
    def run(variables):
        def loss(params):
            logits, _, stats = network.apply(net, {**variables, 'params': params}, x, train)
            return jnp.sum(logits * weights), (logits, stats)

        (_, (logits, stats)), grads = jax.value_and_grad(loss, has_aux=True)(variables['params'])
        return network.apply(net, variables, x)[0], logits, grads, stats

    return jax.device_get(run(variables))


def compare(found, expected):
    """Largest differences, each relative to the array's largest value; prints and checks them.

    A gradient that is 0 up to rounding, since a later normalization removes what the parameter adds, is
    relative to the largest gradient of all.
    """
    worst = {}
    kinds = ('eval logits', 'train logits', 'gradients', 'statistics')
    for kind, a, b in zip(kinds, found, expected, strict=True):
        a, b = ({**flat(tree)} for tree in (a, b))
        assert a.keys() == b.keys()
        largest = max((np.abs(x).max() for x in b.values()), default=0)
        for path, x in b.items():
            scale = np.abs(x).max()
            scale = largest if scale < 1e-9 * largest else scale
            error = np.abs(a[path] - x).max() / scale
            assert np.isfinite(error), (kind, path)
            worst[kind] = max(worst.get(kind, 0.0), error)
    print('  '.join(f'{kind} {error:.1e}' for kind, error in worst.items()))
    assert max(worst.values()) < TOLERANCE


def flat(tree):
    return {network.names_of(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


TORCHVISION = {
    'squeezenet1_0': ('squeezenet', {}),
    'squeezenet1_1': ('squeezenet:1.1', {}),
    'mobilenet_v2': ('mobilenet', {}),
    'shufflenet_v2_x0_5': ('shufflenet:x0.5', {}),
    'shufflenet_v2_x1_0': ('shufflenet', {}),
}


@pytest.mark.parametrize('name', TORCHVISION)
def test_torchvision(name):
    torch = pytest.importorskip('torch', reason='needs torch: make test-deploy')
    torchvision = import_torchvision()
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    model = getattr(torchvision.models, name)(weights=None, num_classes=CLASSES).double()
    counts = {}
    with torch.no_grad():
        for place, module in model.named_modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if isinstance(module, torch.nn.BatchNorm2d):
                for leaf in ('weight', 'bias', 'running_mean', 'running_var'):
                    value = getattr(module, leaf)
                    value.copy_(torch.from_numpy(random_norms(rng, leaf, value)))
                module.register_forward_hook(
                    lambda m, inputs, _, place=place: counts.__setitem__(
                        f'{place}.running_var', inputs[0].numel() // m.num_features
                    )
                )

    def arrays(tensors):
        return {key: x.detach().numpy().copy() for key, x in tensors}

    before, x = arrays(model.state_dict().items()), images()
    pictures = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    weights = rng.normal(size=(BATCH, CLASSES))
    tested = model.eval()(pictures).detach().numpy()
    trained = model.train()(pictures)
    (trained * torch.from_numpy(weights)).sum().backward()
    grads = arrays((key, p.grad) for key, p in model.named_parameters())
    after = arrays(model.state_dict().items())
    for key, n in counts.items():  # from torch's unbiased variance of the batch to ours
        batch = (after[key] - 0.9 * before[key]) / 0.1
        after[key] = 0.9 * before[key] + 0.1 * batch * (n - 1) / n
    with jax.enable_x64(True):
        preset, changes = TORCHVISION[name]
        net = make(preset, **changes)
        start = from_torch.from_state_dict(net, before)
        found = ours(net, start, x, weights)
        grads = from_torch.from_state_dict(net, {**after, **grads})['params']
        stats = from_torch.from_state_dict(net, after)['batch_stats']
    compare(found, (tested, trained.detach().numpy(), grads, stats))


def import_torchvision():
    """CUDA wheels lack their operators next to a CPU build of torch; the networks do not need them."""
    try:
        return pytest.importorskip('torchvision', reason='needs torchvision: make test-deploy')
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in ('_meta_registrations', '_autograd_registrations'):
            sys.modules[f'torchvision.{name}'] = types.ModuleType(name)
        return importlib.import_module('torchvision')


def from_keras(net, arrays):
    """Variables from Keras's weights in the order of its layers, which is that of ours."""
    leaves = {'gamma': 'scale', 'beta': 'bias', 'moving_mean': 'mean', 'moving_variance': 'var'}
    shapes, found = variables.leaves(net), {}
    names = [tuple(layer.name.split('/')) for layer in network.summary(net, SIDE)]
    for layer, weights in zip(names, arrays, strict=True):
        for name, x in weights.items():
            kind = 'batch_stats' if name.startswith('moving') else 'params'
            leaf = leaves.get(name, name)
            if (kind, *layer, leaf) not in shapes:
                leaf = 'depthwise'
            found[kind, *layer, leaf] = x.reshape(shapes[kind, *layer, leaf])
    assert found.keys() == shapes.keys()
    return variables.nest(found)


@pytest.mark.parametrize(
    ('name', 'preset', 'changes'),
    [
        ('MobileNet', 'mobilenet:v1', {}),
        (
            'MobileNetV2',
            'mobilenet',
            {'padding': 'tensorflow', 'norm_momentum': 0.999, 'norm_epsilon': 1e-3},
        ),
    ],
)
def test_keras(name, preset, changes):
    os.environ['CUDA_VISIBLE_DEVICES'] = ''
    keras = pytest.importorskip('keras', reason='needs Keras: make test-deploy')
    tf = pytest.importorskip('tensorflow', reason='needs TensorFlow: make test-deploy')
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy('float64')
    keras.config.set_floatx('float64')
    rng = np.random.default_rng(1)
    model = getattr(keras.applications, name)(
        input_shape=(SIDE, SIDE, 3),
        weights=None,
        classes=CLASSES,
        classifier_activation=None,
        **({'dropout': 0.0} if name == 'MobileNet' else {}),
    )
    layers = [layer for layer in model.layers if layer.weights]
    for layer in layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            for v in layer.weights:
                v.assign(random_norms(rng, v.name, v.numpy()))

    def arrays(values=None):
        return [
            {
                v.name: v.numpy() if values is None else values.get(v.path, v.numpy())
                for v in layer.weights
            }
            for layer in layers
        ]

    before, x, weights = arrays(), images(), rng.normal(size=(BATCH, CLASSES))
    tested = model(x, training=False).numpy()
    with tf.GradientTape() as tape:
        trained = model(x, training=True)
        loss = tf.reduce_sum(trained * weights)
    slopes = tape.gradient(loss, [v.value for v in model.trainable_variables])
    slopes = {v.path: g.numpy() for v, g in zip(model.trainable_variables, slopes, strict=True)}
    after = arrays()
    with jax.enable_x64(True):
        net = make(preset, **changes)
        found = ours(net, from_keras(net, before), x, weights)
        grads = from_keras(net, arrays(slopes))['params']
        stats = from_keras(net, after)['batch_stats']
    compare(found, (tested, trained.numpy(), grads, stats))
