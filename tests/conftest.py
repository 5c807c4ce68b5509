"""All tests run on eight CPU devices, set up like the commands, without silent rank promotion."""

import os
import signal
import tempfile

import jax
import jaxlib

from alexnet_jax.devices import mesh
from tests.helpers.processes import compilation_cache

# Tests mostly wait for the compiler. Without fusion emitters it needs two thirds of the time; XLA aborts
# on unknown flags. Programs started by tests inherit this.
os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=1'
if jaxlib.__version__.startswith('0.10.'):
    os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false'
# Each pytest worker, with everything it starts, gets its own share of the cores: programs that take turns
# on one core lose less time than programs whose threads wait for each other on all cores.
worker, workers = (os.environ.get(f'PYTEST_XDIST_WORKER{end}') for end in ('', '_COUNT'))
if worker and hasattr(os, 'sched_setaffinity'):  # Linux
    cores = sorted(os.sched_getaffinity(0))[int(worker.removeprefix('gw')) :: int(workers)]
    os.sched_setaffinity(0, cores or os.sched_getaffinity(0))
mesh.configure(cpu_devices=8)
# Shells make background jobs ignore Ctrl-C, and programs started here would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Each pytest worker, with everything it starts, compiles equal programs once. The folder is new each
# time, so that nothing old is tested.
if worker:
    programs = os.path.join(os.environ['JAX_COMPILATION_CACHE_DIR'], worker)
else:
    kept = tempfile.TemporaryDirectory(prefix='alexnet_jax-programs-')  # until the end of the tests
    programs = kept.name
for name, value in compilation_cache(programs).items():
    os.environ[name] = value
    jax.config.update(name.lower(), value if name.endswith('DIR') else int(value))

jax.config.update('jax_numpy_rank_promotion', 'raise')

# Files are handed out one by one, so the last ones should be short.
LONGEST_FIRST = (
    'test_parallel',
    'test_main',
    'test_distributed',
    'test_resume',
    'test_loop',
    'test_alexnet',
    'test_steps',
    'test_benchmark',
    'test_imagenet',
    'test_scaling',
    'test_chaos',
    'test_buckets',
    'test_checkpoint',
    'test_prepare',
)


def pytest_collection_modifyitems(items):
    order = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
