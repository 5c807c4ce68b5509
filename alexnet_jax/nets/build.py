"""Builds the network that a config names."""

import importlib
import pkgutil

from alexnet_jax import nets
from alexnet_jax.common.errors import choose
from alexnet_jax.nets.network import Network


def build(*, net: str, classes: int, **fields) -> Network:
    """Builds the network described by `config.model`; net: a module in `nets/` with a `build` function.

    Raises UserError for an unknown network, fields of a different network, or invalid values.
    """
    builders = _builders()
    choose('config.model.net', net, builders)
    return builders[net](classes=classes, **fields)


def _builders() -> dict:
    names = [
        module.name for module in pkgutil.iter_modules(nets.__path__) if module.name != 'build'
    ]
    modules = {name: importlib.import_module(f'{nets.__name__}.{name}') for name in names}
    return {name: module.build for name, module in modules.items() if hasattr(module, 'build')}
