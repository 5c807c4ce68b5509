"""Every test sees eight CPU devices, set up as the commands do, and no silent rank promotion."""

import os
import signal

import jax
import jaxlib

from alexnet_jax import mesh

# Tests mostly wait for the compiler, and the programs they start inherit this. Without the emitters
# of fusions it needs two thirds of the time; an XLA that does not know a flag aborts.
os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=1'
if jaxlib.__version__.startswith('0.10.'):
    os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false'
mesh.configure(cpu_devices=8)
# A shell makes what it starts in the background ignore Ctrl-C, and programs would inherit that, too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
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
