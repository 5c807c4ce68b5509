"""The network contract: all that the rest of the program knows about a network.

A network is a module in `nets/`, named by `config.model.net`, whose `build(classes, **fields)` returns
a `Network`. `config.model` holds its fields; the preset that introduces the network lists them.
Variables are {'params': ..., 'batch_stats': ...}, nested to any depth; `batch_stats` is {} for a
network without running statistics. A path is a tuple of names, such as ('conv1', 'kernel').
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from alexnet_jax.common.errors import InputError, UserError, one_line

Path = tuple[str, ...]


class Training(NamedTuple):
    """Inputs that only training needs.

    key: the dropout key of this step; rows i32[B]: the images' rows in the global batch, which key
    their masks; frozen: layers whose running statistics do not change, such as 'block/norm1'; momentum:
    replaces that of the running statistics, if given.
    """

    key: jax.Array
    rows: jax.Array
    frozen: tuple[str, ...] = ()
    momentum: float | None = None


class Network(nn.Module):
    """The base class of all networks. Their fields are those of `config.model`, without defaults.

    A subclass has the fields `classes` and `towers` (1 unless the mesh axis `model` can divide the
    network; a constant will do), the property `names`, `local` if it has batch normalization, and

        __call__(images f32[B,H,W,3], train: Training | None = None) -> (logits f32[B,K], out)

    where `out` maps names to activations in the order of the forward pass: arrays, or tuples with one
    array per tower of this device.
    """

    @property
    def names(self) -> list[str]:
        """The names of all activations in the order of the forward pass, then of the last layer.

        They include every top-level layer of `params`.
        """
        raise NotImplementedError

    @property
    def head(self) -> Path:
        """The last layer, which `init_from` reinitializes if the classes differ."""
        return (self.names[-1],)

    @property
    def first(self) -> tuple[str, ...]:
        """The layers that `config.optim.conv1` applies to."""
        return ()

    @property
    def bound(self) -> float | None:
        """The largest absolute output of a hidden unit; None if there is none, as for ReLU."""
        return None

    @nn.nowrap
    def role(self, path: Path) -> str:
        """What determines a parameter's learning rate and weight decay: 'kernel', 'bias', 'scale', ..."""
        return path[-1]

    @nn.nowrap
    def partition(self, path: Path) -> P:
        """How the mesh axis `model` shards a parameter or statistic."""
        del path
        return P()

    @nn.nowrap
    def local(self, shards: int, data_axis: str | None) -> 'Network':
        """The network as one of `shards` devices along `model` sees it.

        data_axis: the mesh axis that shards the batch, over which statistics are averaged; None if
        each device has the whole batch.
        """
        del shards, data_axis
        return self

    @nn.nowrap
    def first_kernels(self, params: dict) -> jax.Array | None:
        """The kernels of Figure 3, f32[T,h,w,3,C]; None if the first layer is not a convolution."""
        del params
        return None

    @nn.nowrap
    def check(self) -> None:
        """Raises UserError if the value of a field is invalid or conflicts with other fields."""


def make(
    cls: type[Network], *, classes: int, renamed: dict[str, str] | None = None, **fields
) -> Network:
    """Makes and checks a network of class `cls`; UserError for missing or unknown fields.

    renamed: {name in `config.model`: name in the class}, for names that Flax reserves.
    """
    renamed = renamed or {}
    names = {inner: outer for outer, inner in renamed.items()}
    own = {
        names.get(field.name, field.name)
        for field in dataclasses.fields(cls)
        if field.init and field.default is dataclasses.MISSING and field.name != 'classes'
    }
    missing, unknown = sorted(own - {*fields}), sorted({*fields} - own)
    if missing or unknown:
        words = [f'missing: {", ".join(missing)}'] * bool(missing)
        words += [f'unknown: {", ".join(unknown)}'] * bool(unknown)
        raise UserError(
            f'config.model does not match the fields of {cls.__name__} ({"; ".join(words)}): start from '
            'a preset of this network'
        )
    # A config read back from JSON has lists, which would make the network unhashable.
    values = {renamed.get(name, name): _tuples(value) for name, value in fields.items()}
    for field in dataclasses.fields(cls):
        if field.name in values and not _fits(values[field.name], field.type):
            name = names.get(field.name, field.name)
            kind = field.type if typing.get_origin(field.type) else field.type.__name__
            raise UserError(f'config.model.{name}={values[field.name]!r}: must be of type {kind}')
    net = cls(classes=classes, **values)
    net.check()
    return net


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value has the type of a field's annotation; True for annotations other than these."""
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        return isinstance(value, tuple) and all(_fits(x, element) for x in value)
    if kind in (int, float) and isinstance(value, bool):
        return False
    return kind not in (bool, int, float, str) or isinstance(
        value, (int, float) if kind is float else kind
    )


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def init(net: Network, key: jax.Array, crop: int) -> dict[str, Any]:
    """Fresh float32 variables for images of crop x crop pixels: a pure function of the key."""
    return {'batch_stats': {}, **net.init(key, jnp.zeros((1, crop, crop, 3)))}


def shapes(net: Network, crop: int) -> dict[str, Any]:
    """`init` without the arithmetic: a jax.ShapeDtypeStruct for every variable.

    Raises UserError if the network does not fit such crops.
    """
    return _shapes(lambda: init(net, jax.random.key(0), crop), crop)


def _shapes(function: Callable, crop: int):
    try:
        return jax.eval_shape(function)
    except InputError as error:
        raise UserError(f'config.augment.crop={crop}: {error}') from error
    except (TypeError, ValueError, ArithmeticError) as error:  # JAX's own, about a shape
        raise UserError(
            f'config.model does not fit crops of config.augment.crop={crop} pixels ({one_line(error)})'
        ) from error


class Layer(NamedTuple):
    """A layer with parameters, as `summary` describes it."""

    name: str  # such as 'block1/depthwise'
    output: tuple[int, ...]  # [H,W,C] or [C], over all towers
    parameters: int
    macs: int  # multiply-adds for one image


def summary(net: Network, crop: int) -> list[Layer]:
    """Describes the layers that have parameters, in the order of the forward pass; UserError as `shapes`."""
    outputs, order, local = {}, [], set()

    def keep(module, method):
        if method == '__call__' and module.path not in order:
            order.append(module.path)
            if getattr(module, 'positions', 1) == 0:
                local.add(module.path)
        return method == '__call__'

    def run():
        images = jnp.zeros((1, crop, crop, 3))
        return net.init_with_output(jax.random.key(0), images, capture_intermediates=keep)

    _, variables = _shapes(run, crop)
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables['intermediates']):
        *names, _, _ = names_of(path)[: names_of(path).index('__call__') + 2]
        outputs.setdefault(tuple(names), []).append(leaf.shape[1:])
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables['params']):
        *owner, name = names_of(path)
        layer = found.setdefault(tuple(owner), [0, 0])
        layer[0] += leaf.size
        if net.role(names_of(path)) in ('kernel', 'depthwise'):
            towers = outputs[tuple(owner)]
            positions = 1 if tuple(owner) in local else math.prod(towers[0][:-1])
            layer[1] += leaf.size * positions

    def place(path):  # a module is called before those inside it, but returns after them
        inner = [order.index(other) for other in order if other[: len(path)] == path]
        return min(inner), len(path)

    shown = []
    for path in sorted(found, key=place):
        towers = outputs[path]
        shape = (*towers[0][:-1], sum(shape[-1] for shape in towers))
        shown.append(Layer('/'.join(path), shape, *found[path]))
    return shown


def apply(
    net: Network, variables: dict[str, Any], images: jax.Array, train: Training | None = None
) -> tuple[jax.Array, dict[str, Any], dict[str, Any]]:
    """images f32[B,H,W,3] -> (logits f32[B,K], activations by name, new batch_stats).

    Without `train`, runs as at test time, and the statistics do not change.
    """
    if train is None:
        logits, out = net.apply(variables, images)
        return logits, out, variables['batch_stats']
    (logits, out), changed = net.apply(variables, images, train, mutable=['batch_stats'])
    return logits, out, changed.get('batch_stats', {})


def names_of(path) -> Path:
    """The path of a leaf in JAX's form -> its names."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def inside(path: Path, layers: Sequence[str]) -> bool:
    """Whether a path is one of `layers`, such as 'conv1' or 'block/norm1', or inside one."""
    return any(path[: len(parts)] == parts for parts in (tuple(x.split('/')) for x in layers))


def in_head(net: Network, path: Path) -> bool:
    """Whether a path is in the last layer."""
    return path[: len(net.head)] == net.head


def specs(net: Network, tree: Any, shards: int) -> Any:
    """The partition spec of every leaf of `params` or `batch_stats`; P() for one shard."""
    return jax.tree.map_with_path(
        lambda path, _: net.partition(names_of(path)) if shards > 1 else P(), tree
    )
