"""State dicts: names and shapes as torchvision documents them; values are in tests/deploy."""

import numpy as np
import pytest

from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError
from alexnet_jax.nets.build import build
from alexnet_jax.weights import torch, variables

SMALL = {
    'squeezenet': {
        'features.0.weight': (96, 3, 7, 7),
        'features.12.expand3x3.weight': (256, 64, 3, 3),
        'classifier.1.bias': (5,),
    },
    'squeezenet:1.1': {
        'features.0.weight': (64, 3, 3, 3),
        'features.9.squeeze.bias': (48,),
    },
    'mobilenet': {
        'features.0.0.weight': (32, 3, 3, 3),
        'features.1.conv.0.0.weight': (32, 1, 3, 3),
        'features.1.conv.1.weight': (16, 32, 1, 1),
        'features.2.conv.1.1.running_var': (96,),
        'features.17.conv.3.running_mean': (320,),
        'features.18.0.weight': (1280, 320, 1, 1),
        'classifier.1.weight': (5, 1280),
    },
    'shufflenet': {
        'conv1.0.weight': (24, 3, 3, 3),
        'stage2.0.branch1.0.weight': (24, 1, 3, 3),
        'stage4.3.branch2.6.bias': (232,),
        'fc.weight': (5, 1024),
    },
}


def net(preset, **changes):
    return build(classes=5, **{**configfile.load(preset).model, **changes})


def state_of(network):
    """A state dict of zeros, from the names and shapes that the function asks for."""
    names, shapes = torch.names(network), variables.leaves(network)
    return {
        names(path): np.zeros(variables.their_shape(network, path, shape), np.float32)
        for path, shape in shapes.items()
    }


@pytest.mark.parametrize('preset', SMALL)
def test_names_and_shapes(preset):
    state = state_of(net(preset))
    assert {name: state[name].shape for name in SMALL[preset]} == SMALL[preset]


def test_layouts():
    """A kernel's entry goes to its place, and the pixels' scale into the first kernel alone."""
    network = net('mobilenet', input_std=2.0)
    state = state_of(network)
    state['features.0.0.weight'][7, 2, 0, 1] = 1
    state['features.1.conv.0.0.weight'][5, 0, 2, 1] = 1
    state['classifier.1.weight'][3, 9] = 1
    state['features.0.1.num_batches_tracked'] = np.int64(3)
    params = torch.from_state_dict(network, state, std=(1.0, 1.0, 4.0))['params']
    assert params['conv1']['kernel'][0, 1, 2, 7] == 0.5
    assert params['block1']['depthwise']['depthwise'][2, 1, 5] == 1
    assert params['fc']['kernel'][9, 3] == 1
    assert params['conv1']['kernel'].dtype == np.float32


def test_names_that_do_not_match_are_listed():
    network = net('mobilenet')
    state = state_of(network)
    state['features.99.bias'] = state.pop('features.18.1.bias')
    state['classifier.1.weight'] = np.zeros((1000, 1280))
    state['classifier.1.bias'] = np.array(['a'] * 5)
    with pytest.raises(UserError) as error:
        torch.from_state_dict(network, state)
    message = str(error.value)
    assert '\n' not in message
    for part in (
        'missing: features.18.1.bias;',
        'extra: features.99.bias;',
        'shapes: classifier.1.weight is [1000, 1280] but should be [5, 1280];',
        'not floats: classifier.1.bias)',
    ):
        assert part in message, message
    with pytest.raises(UserError, match=r'missing: features\S+, .* and 258 more\)'):
        torch.from_state_dict(network, {})


@pytest.mark.parametrize('preset', ['mobilenet:v1', 'paper'])
def test_networks_that_torchvision_lacks(preset):
    with pytest.raises(UserError, match='torchvision has no such network'):
        torch.from_state_dict(net(preset), {})
