"""From the switches of `config.model` to the network: checks them, and works out what they mean.

`configs/base.py` says what each switch does, the other files in `configs/` set them. Nothing here
knows a preset.
"""

import inspect

import flax.linen as nn
import jax.numpy as jnp

from alexnet_jax.common.errors import UserError, choose, one_each
from alexnet_jax.nets import alexnet, cuda_convnet


def build(*, net: str, classes: int, **fields):
    """The network that the fields of `config.model` describe.

    net: 'alexnet' (`build_alexnet`) or 'cuda_convnet' (`cuda_convnet.build`). Raises UserError where a
    field has a value that does not exist or that the others exclude.
    """
    nets = {'alexnet': build_alexnet, 'cuda_convnet': cuda_convnet.build}
    choose('config.model.net', net, nets)
    if {*inspect.signature(nets[net]).parameters} - {*fields, 'classes'}:
        raise UserError(
            f'config.model.net={net!r} has fields of its own: give a config that has them, as '
            'configs/paper.py for alexnet and configs/cifar10.py for cuda_convnet'
        )
    return nets[net](classes=classes, **fields)


def build_alexnet(
    *,
    classes: int,
    towers: int,
    kernels: tuple[int, ...],
    hidden: tuple[int, ...],
    groups: int,
    exchange: tuple[str, ...],
    remove: str,
    activation: str,
    after: tuple[str, ...],
    norms: str,
    norm_alpha: float,
    norm_alpha_per: str,
    norm_k: float,
    norm_n: int,
    norm_beta: float,
    norm_window: str,
    pooling: str,
    dropout: str,
    dropout_at: str,
    conv1_padding: tuple[int, int],
    width: float,
    init: str,
    std: tuple[float, ...],
    bias: tuple[float, ...],
    dtype: str,
) -> alexnet.AlexNet:
    """The paper's network, and its relatives; see `configs/base.py` for each switch."""
    convs = len(kernels)
    names = tuple(f'conv{i + 1}' for i in range(convs))
    layer_names = (*names, 'fc6', 'fc7', 'fc8')
    if convs not in (5, 6) or len(hidden) != 2:
        raise UserError('config.model: 5 or 6 numbers of kernels and 2 numbers of hidden units')

    choose('config.model.activation', activation, tuple(alexnet.ACTIVATIONS))
    choose('config.model.pooling', pooling, tuple(alexnet.POOLING))
    choose('config.model.norms', norms, ('all', 'first', 'none'))
    choose('config.model.norm_window', norm_window, ('tower', 'all'))
    choose('config.model.norm_alpha_per', norm_alpha_per, ('element', 'window'))
    choose('config.model.dropout', dropout, ('original', 'inverted', 'none'))
    choose('config.model.dropout_at', dropout_at, ('outputs', 'inputs'))
    choose('config.model.init', init, ('gaussian', 'torch'))
    choose('config.model.dtype', dtype, alexnet.dtypes())
    choose('config.model.remove', remove, ('none', *names[:5]))
    for name in exchange:
        choose('config.model.exchange', name, (*names[1:], 'fc6', 'fc7'))
    for ops in after:
        for op in ops.split():
            choose('config.model.after', op, ('act', 'norm', 'map_norm', 'pool'))
    one_each('config.model.after', after, convs)
    one_each('config.model.std', std, len(layer_names))
    one_each('config.model.bias', bias, len(layer_names))
    for name, value in (('towers', towers), ('groups', groups), ('width', width)):
        if value <= 0:
            raise UserError(f'config.model.{name}={value}: must be above 0')
    if norm_n % 2 == 0:
        raise UserError(f'config.model.norm_n={norm_n}: a window of an odd number of channels')

    def per_tower(count):
        value = count * width / towers / groups
        if value < 1 or value != int(value):
            raise UserError(
                f'config.model.width={width}: {count} channels would be {value:g} for each of '
                f'{towers * groups} towers and groups, not an integer'
            )
        return int(value) * groups

    kept = {'all': range(convs), 'first': range(1), 'none': ()}[norms]
    after = tuple(
        ' '.join(op for op in ops.split() if i in kept or 'norm' not in op)
        for i, ops in enumerate(after)
    )
    # A narrow network is dead at the start if its layers do not compensate for their smaller fan-in.
    scales = [s if i == 0 else s * width**-0.5 for i, s in enumerate(std)]
    if init == 'torch':
        kernel_inits = bias_inits = (alexnet.uniform,) * len(layer_names)
    else:
        kernel_inits = tuple(lambda fan_in, s=s: alexnet.gaussian(s) for s in scales)
        bias_inits = tuple(lambda fan_in, b=b: nn.initializers.constant(b) for b in bias)
    return alexnet.AlexNet(
        classes=classes,
        kernels=tuple(per_tower(count) for count in kernels),
        hidden=tuple(per_tower(count) for count in hidden),
        groups=groups,
        exchange=tuple(exchange),
        remove=remove,
        activation=activation,
        after=after,
        norm={
            'alpha': norm_alpha / (norm_n if norm_alpha_per == 'window' else 1),
            'k': norm_k,
            'n': norm_n,
            'beta': norm_beta,
        },
        norm_window=norm_window,
        pooling=pooling,
        dropout=dropout,
        dropout_at=dropout_at,
        conv1_padding=tuple(conv1_padding),
        kernel_inits=kernel_inits,
        bias_inits=bias_inits,
        dtype=jnp.dtype(dtype),
        local_towers=towers,
        axis=None,
    )
