"""PyTorch's state dicts. tests/deploy/test_export.py opens them with PyTorch."""

import numpy as np
import pytest

from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError
from alexnet_jax.nets.build import build
from alexnet_jax.rundir import fingerprint
from alexnet_jax.weights import to_torch, variables


def make(preset, crop, **changes):
    net = build(classes=4, **{**configfile.load(preset).model, **changes})
    rng = np.random.default_rng(0)
    arrays = {
        path: rng.normal(size=shape).astype(np.float32)
        for path, shape in variables.leaves(net, crop).items()
    }
    return net, arrays


@pytest.mark.parametrize(
    ('preset', 'crop', 'changes'),
    [
        ('paper', 64, {'width': 0.125}),
        ('original', 64, {'width': 0.125, 'dropout_at': 'inputs'}),
        ('caffe', 67, {'width': 0.125}),
        ('mobilenet', 64, {'width': 0.35, 'input_std': 58.0}),
        ('squeezenet', 64, {'input_std': 58.0}),
        ('shufflenet:x0.5', 64, {}),
    ],
)
def test_read_back(preset, crop, changes):
    net, arrays = make(preset, crop, **changes)
    state = to_torch.decoded(to_torch.encoded(to_torch.state_dict(net, arrays, crop)))
    found = fingerprint.named_leaves(to_torch.variables_of(net, state, crop))
    assert found.keys() == {'/'.join(path) for path in arrays}
    for path, x in arrays.items():
        np.testing.assert_allclose(found['/'.join(path)], x, rtol=1e-6, atol=1e-6)


def test_towers_are_concatenated():
    net, arrays = make('paper', 112, width=0.125)
    state = to_torch.state_dict(net, arrays, 112)
    kernel = arrays['params', 'conv2', 'kernel']  # [2,5,5,6,16]
    assert state['conv2.weight'].shape == (32, 6, 5, 5)
    assert (state['conv2.weight'][16 + 3, 4, 1, 2] == kernel[1, 1, 2, 4, 3]).all()
    # fc6 reads the channels of both towers; ours are (h, w, c), PyTorch's (c, h, w).
    inputs = arrays['params', 'fc6', 'kernel']
    assert state['fc6.weight'].shape == (512, inputs.shape[1])
    assert state['fc6.weight'][256 + 5, 7] == inputs[1, 7 * 32, 5]
    # The 0.5 of dropout at test time is part of the next layers.
    assert (state['fc8.weight'][:, 256:] == 0.5 * arrays['params', 'fc8', 'kernel'][1].T).all()
    assert (state['fc7.bias'] == arrays['params', 'fc7', 'bias'].reshape(-1)).all()


@pytest.mark.parametrize(
    ('preset', 'crop', 'changes', 'words'),
    [
        ('no_talk', 64, {'width': 0.125}, 'fc6 reads only its own tower'),
        ('paper', 64, {'width': 0.125, 'remove': 'conv3'}, 'config.model.remove=conv3'),
        ('paper', 64, {'width': 0.125, 'pooling': 'disjoint'}, 'config.model.pooling=disjoint'),
        ('mobilenet', 64, {'padding': 'tensorflow'}, 'config.model.padding=tensorflow'),
        ('squeezenet', 64, {'width': 0.5}, 'config.model.width=0.5'),
        ('mobilenet:v1', 64, {'padding': 'torch', 'activation': 'relu6'}, 'no class for this'),
        ('cifar10', 24, {}, 'no class for this'),
        ('alexnet_bn', 64, {'width': 0.125}, 'no class for this'),
    ],
)
def test_networks_without_a_class(preset, crop, changes, words):
    net, arrays = make(preset, crop, **changes)
    with pytest.raises(UserError, match=words):
        to_torch.state_dict(net, arrays, crop)
