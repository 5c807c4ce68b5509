"""Every test sees eight CPU devices, set up as the commands do, and no silent rank promotion."""

import os

import jax

from alexnet_jax import mesh

# Tests mostly wait for the compiler, and the programs they start inherit this.
os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=1'
mesh.configure(cpu_devices=8)
jax.config.update('jax_numpy_rank_promotion', 'raise')

# Files are shared out one by one: the last ones should be short.
LONGEST_FIRST = (
    'test_parallel', 'test_main', 'test_distributed', 'test_resume', 'test_train', 'test_model',
    'test_steps', 'test_benchmark', 'test_imagenet', 'test_scaling', 'test_chaos', 'test_cloud',
    'test_checkpoint', 'test_prepare',
)  # fmt: skip


def pytest_collection_modifyitems(items):
    order = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
