"""The network that a config names."""

import importlib
import pkgutil

from alexnet_jax import nets
from alexnet_jax.common.errors import choose
from alexnet_jax.nets.network import Network


def build(*, net: str, classes: int, **fields) -> Network:
    """The network that `config.model` describes; net: a module of `nets/` with a function `build`.

    Raises UserError for an unknown network, for fields of another one, and for impossible values.
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
