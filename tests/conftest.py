"""Gives every test eight CPU devices, set up as the commands do, and no silent rank promotion."""

import os
import signal
import tempfile

import jax
import jaxlib

from alexnet_jax.devices import mesh
from tests.helpers.processes import compilation_cache

# Tests mostly wait for the compiler; the programs they start inherit these flags. Without fusion emitters
# it takes two thirds of the time. XLA aborts on unknown flags, hence the version check.
os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=1'
if jaxlib.__version__.startswith('0.10.'):
    os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false'
# Each pytest worker, with everything it starts, keeps to its share of the cores: programs that take turns
# on a core lose less than programs whose threads wait for one another on all of them.
worker, workers = (os.environ.get(f'PYTEST_XDIST_WORKER{end}') for end in ('', '_COUNT'))
if worker and hasattr(os, 'sched_setaffinity'):  # Linux
    cores = sorted(os.sched_getaffinity(0))[int(worker.removeprefix('gw')) :: int(workers)]
    os.sched_setaffinity(0, cores or os.sched_getaffinity(0))
mesh.configure(cpu_devices=8)
# A shell makes background processes ignore Ctrl-C, and the programs they start would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Each pytest worker, with everything it starts, compiles identical programs once. The folder is new every
# time, so that no old program is tested.
if worker:
    programs = os.path.join(os.environ['JAX_COMPILATION_CACHE_DIR'], worker)
else:
    kept = tempfile.TemporaryDirectory(prefix='alexnet_jax-programs-')  # until the end of the tests
    programs = kept.name
for name, value in compilation_cache(programs).items():
    os.environ[name] = value
    jax.config.update(name.lower(), value if name.endswith('DIR') else int(value))

jax.config.update('jax_numpy_rank_promotion', 'raise')

# Workers take files one by one, so the last ones should be short.
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
