"""State dicts of torchvision's AlexNet, SqueezeNet, MobileNet v2 and ShuffleNet v2."""

from collections.abc import Callable, Sequence

import numpy as np

from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError
from alexnet_jax.nets import network
from alexnet_jax.nets.alexnet import AlexNet
from alexnet_jax.nets.mobilenet import MobileNet
from alexnet_jax.nets.network import Network
from alexnet_jax.nets.shufflenet import ShuffleNet
from alexnet_jax.nets.squeezenet import SqueezeNet
from alexnet_jax.weights import variables
from alexnet_jax.weights.variables import Damaged, Imported, Options, Weights

LEAVES = {'kernel': 'weight', 'depthwise': 'weight', 'bias': 'bias'}
NORM = {'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var'}
PRESETS = ('owt', 'squeezenet', 'squeezenet:1.1', 'mobilenet', 'shufflenet', 'shufflenet:x0.5')
MEAN = tuple(255 * x for x in (0.485, 0.456, 0.406))  # that torchvision documents, of pixels
STD = tuple(255 * x for x in (0.229, 0.224, 0.225))
# Where torchvision's AlexNet, whose pooling treats borders differently, has the same maps.
CROPS = 224, 225
# The fields of an AlexNet that determine what it computes, except for its size.
COMPUTING = (
    *('towers', 'kernels', 'groups', 'remove', 'activation', 'after', 'norms', 'pooling'),
    'conv1_padding',
)
COUNTER = 'num_batches_tracked'  # of each batch normalization; nothing here needs it


def from_state_dict(
    net: Network,
    state: dict[str, np.ndarray],
    std: float | Sequence[float] | None = None,
    crop: int = 224,
) -> dict:
    """Converts a state dict, as arrays, to the variables of a network, in the arrays' dtype.

    std: what torchvision's network divides pixels (0 to 255) by, for each channel: 255 times the one it
    documents. Without it, both get the same inputs. crop: the side of the network's images in pixels.
    Running variances stay unbiased. Raises UserError unless names and shapes are those of the network,
    and for an AlexNet that computes something else at this size.
    """
    if isinstance(net, AlexNet) and crop not in CROPS:
        raise UserError(
            f"crop={crop}: torchvision's pooling treats borders differently; its AlexNet equals this one at "
            f'{" or ".join(map(str, CROPS))} pixels'
        )
    name, shapes = names(net), variables.leaves(net, crop)
    given = {key: np.asarray(x) for key, x in state.items() if key.split('.')[-1] != COUNTER}
    variables.check(
        f'the state dict is not that of this {type(net).__name__}',
        {name(path): variables.their_shape(net, path, shape) for path, shape in shapes.items()},
        given,
        'choose the preset and the fields of config.model that it was trained with',
    )
    arrays = {path: variables.from_theirs(net, path, given[name(path)]) for path in shapes}
    if std is not None:
        first = ('params', 'conv1', 'kernel')
        arrays[first] = variables.for_pixels(net, arrays[first], std)
    return variables.nest(arrays)


def read(state: dict[str, np.ndarray], options: Options) -> Imported:
    """Converts the state dict of any of these networks; raises Damaged, UserError."""

    def common(preset):
        net = variables.preset(preset, 2, {})
        name, shapes = names(net), variables.leaves(net, CROPS[0])
        shapes = {name(path): variables.their_shape(net, path, x) for path, x in shapes.items()}
        return sum(key in state and state[key].shape == shape for key, shape in shapes.items())

    preset = options.chosen(max(PRESETS, key=common), PRESETS)
    net = variables.preset(preset, 2, {})
    head = names(net)(('params', *net.head, 'bias'))
    if not common(preset) or head not in state or state[head].ndim != 1:
        raise Damaged(f"it lacks {head} or other tensors of torchvision's {preset}")
    net, crop = variables.preset(preset, len(state[head]), {}), options.crop or CROPS[0]
    found = from_state_dict(net, state, options.std or STD, crop)
    return Imported(preset, {}, net.classes, Weights(found, MEAN, crop), 'torchvision')


def names(net: Network) -> Callable[[network.Path], str]:
    """A function from the path of a variable to its name in the state dict."""
    modules = {
        AlexNet: _alexnet,
        SqueezeNet: _squeezenet,
        MobileNet: _mobilenet,
        ShuffleNet: _shufflenet,
    }
    if type(net) not in modules or getattr(net, 'version', None) == 1:
        raise UserError(
            "torchvision has no such network: choose preset owt's AlexNet, SqueezeNet, MobileNet v2 or "
            'ShuffleNet v2'
        )
    module = modules[type(net)](net)

    def name(path):
        _, *layer, leaf = path
        if layer[-1] == 'norm':
            return f'{module[tuple(layer[:-1])][1]}.{NORM[leaf]}'
        return f'{module[tuple(layer)][0]}.{LEAVES[leaf]}'

    return name


# The functions below return {layer: (its convolution or matrix, its normalization or '')}.


def _alexnet(net: AlexNet) -> dict:
    theirs = configfile.load('owt').model
    different = [name for name in COMPUTING if getattr(net, name) != theirs[name]]
    different += ['dropout'] * (net.dropout == 'original')  # halves at test time
    if different:
        raise UserError(
            'torchvision has no such network: config.model must be that of preset owt in '
            f'{", ".join(different)}'
        )
    layers = [(f'conv{i + 1}', f'features.{at}') for i, at in enumerate((0, 3, 6, 8, 10))]
    layers += [(f'fc{i + 6}', f'classifier.{at}') for i, at in enumerate((1, 4, 6))]
    return {(name,): (theirs, '') for name, theirs in layers}


def _squeezenet(net: SqueezeNet) -> dict:
    found = {('conv1',): ('features.0', ''), ('conv10',): ('classifier.1', '')}
    for i, name in enumerate(net.names[1:-1], start=2):  # features.1 is a ReLU
        for part in ('squeeze', 'expand1x1', 'expand3x3'):
            found[name, part] = (f'features.{i}.{part}', '')
    return found


def _mobilenet(net: MobileNet) -> dict:
    blocks = [name for name in net.names if name.startswith('block')]
    found = {
        ('conv1',): ('features.0.0', 'features.0.1'),
        ('conv_last',): (f'features.{len(blocks) + 1}.0', f'features.{len(blocks) + 1}.1'),
        ('fc',): ('classifier.1', ''),
    }
    for i, block in enumerate(blocks, start=1):
        parts = ['expand', 'depthwise'][i == 1 :]  # the first block does not expand
        for j, part in enumerate(parts):
            found[block, part] = (f'features.{i}.conv.{j}.0', f'features.{i}.conv.{j}.1')
        found[block, 'project'] = tuple(f'features.{i}.conv.{len(parts) + k}' for k in (0, 1))
    return found


def _shufflenet(net: ShuffleNet) -> dict:
    found = {
        ('conv1',): ('conv1.0', 'conv1.1'),
        ('conv5',): ('conv5.0', 'conv5.1'),
        ('fc',): ('fc', ''),
    }
    places = {
        'left_depthwise': ('branch1', 0),
        'left_project': ('branch1', 2),
        'expand': ('branch2', 0),
        'depthwise': ('branch2', 3),
        'project': ('branch2', 5),
    }
    for unit in (name for name in net.names if name.startswith('stage')):
        stage, number = unit.split('_')
        for part, (branch, i) in places.items():
            found[unit, part] = tuple(f'{stage}.{int(number) - 1}.{branch}.{i + k}' for k in (0, 1))
    return found
