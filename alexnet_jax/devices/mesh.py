"""The ('data', 'model') mesh of devices, and global batches made from the rows of each process.

The axis `model` shards the towers, the axis `data` the images of a batch.
"""

import contextlib
import logging
import os
from collections.abc import Iterator

import jax
import jaxlib
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alexnet_jax.common.errors import UserError, one_line
from alexnet_jax.devices import cpu
from alexnet_jax.devices.backend import choices

# JAX settings, by name, that override the environment's and the caller's: other values would change a run's
# numbers or make it fail.
SETTINGS = {
    'enable_x64': False,
    'default_prng_impl': 'threefry2x32',
    'threefry_partitionable': True,
    'debug_key_reuse': False,
    'numpy_dtype_promotion': 'standard',
    'transfer_guard': 'allow',
    'disable_jit': False,
}


def configure(cpu_devices: int = 0, *, deterministic: bool = False) -> None:
    """Configures JAX. Call this before anything uses JAX.

    cpu_devices: how many virtual CPU devices to create; deterministic: reproduce the same bits on GPUs,
    where the fastest kernels of some operations add in any order (CPUs reproduce them anyway). Raises
    UserError for an invalid number of devices in JAX's own variable.
    """
    for name, value in {**SETTINGS, 'random_seed_offset': 0}.items():
        jax.config.update(f'jax_{name}', value)
    flags = []
    if deterministic:
        flags.append('--xla_gpu_deterministic_ops=true')
    if cpu_devices:
        jax.config.update('jax_platforms', 'cpu')
        jax.config.update('jax_num_cpu_devices', cpu_devices)
    count = jax.config.jax_num_cpu_devices
    if count < 1 and count != -1:  # -1: not set
        raise UserError(f'JAX_NUM_CPU_DEVICES={count}: must be at least 1')
    # jaxlib 0.10 runs convolutions on CPUs in a library that is slower than Eigen for this network.
    # XLA aborts on unknown flags, so set this one only where it exists.
    if jaxlib.__version__.startswith('0.10.'):
        flags.append('--xla_cpu_experimental_ynn_fusion_type=-individual_convolution')
    os.environ['XLA_FLAGS'] = ' '.join([*flags, os.environ.get('XLA_FLAGS', '')]).strip()


def start_devices() -> None:
    """Starts JAX's devices; UserError if that fails, or if JAX_PLATFORMS names a missing kind."""
    named = jax.config.jax_platforms
    logging.getLogger('jax._src.xla_bridge').addFilter(_in_one_line)
    try:
        for kind in (named or '').split(','):
            jax.devices(kind or None)
    except (RuntimeError, AssertionError) as error:  # the latter without a GPU
        if not named:
            raise UserError(
                f'JAX cannot start its devices ({one_line(error)}); JAX_PLATFORMS=cpu uses the CPU alone'
            ) from error
        jax.config.update('jax_platforms', None)
        try:
            here = ', '.join(sorted({device.platform for device in jax.devices()}))
        except RuntimeError:
            here = 'none that works'
        raise UserError(
            f'JAX_PLATFORMS={named}: this machine does not have all of these devices, or JAX lacks the '
            f'package for them; unset it to use what is here ({here})'
        ) from error


def _in_one_line(record: logging.LogRecord) -> bool:
    """Replaces the traceback of a plugin that fails; JAX continues without it."""
    if record.exc_info:
        record.msg = f'{record.getMessage()}: {one_line(record.exc_info[1])}'
        record.args, record.exc_info = (), None
    return True


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """Applies `SETTINGS`, as a context or a decorator, for functions that other programs may call."""
    with contextlib.ExitStack() as stack:
        for name, value in SETTINGS.items():
            stack.enter_context(getattr(jax, name)(value))
        yield


def keep_programs() -> None:
    """Caches compiled programs for later starts on accelerators, where compilation is slow.

    The cache is alexnet_jax/programs in $XDG_CACHE_HOME or ~/.cache. JAX's own settings take
    precedence: JAX_COMPILATION_CACHE_DIR, also on CPUs, and JAX_ENABLE_COMPILATION_CACHE=false.
    """
    if choices().keep_programs and not jax.config.jax_compilation_cache_dir:
        base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
        programs = os.path.join(base, 'alexnet_jax', 'programs')
        jax.config.update('jax_compilation_cache_dir', programs)


def make(shape: tuple[int, int], *, towers: int, batches: dict[str, int]) -> Mesh:
    """Makes a mesh of shape (data, model); 0 means automatic: one device per tower, the rest for data.

    batches: images per step, by config field; each must be divisible by `data`. Raises UserError for
    a shape that the devices, the towers or a batch do not allow.
    """
    start_devices()
    devices = jax.device_count()
    data, model = shape
    for field, batch in batches.items():
        if batch < 1:
            raise UserError(f'{field}={batch}: must be at least 1')
    chosen = model == 0
    if chosen:
        model = towers if devices >= towers * max(data, 1) else 1
    if model not in (1, towers):
        raise UserError(
            f'config.run.mesh: model={model}, but this network has {towers} tower'
            f'{"s" if towers > 1 else ""}: choose model={" or ".join(map(str, {1, towers}))}'
        )
    if data == 0:
        if devices % model and not chosen:
            raise UserError(
                f'config.run.mesh: {devices} devices cannot be divided by model={model}; choose model=1, '
                'give both numbers, or use a different number of devices (--cpu_devices=N)'
            )
        fits = (
            n for n in range(devices // model, 0, -1) if not any(b % n for b in batches.values())
        )
        data = next(fits)
    if data * model > devices:
        raise UserError(
            f'config.run.mesh: {data} x {model} needs {data * model} devices, but there are '
            f'{devices}; --cpu_devices=N creates N virtual ones'
        )
    for field, batch in batches.items():
        if batch % data:
            raise UserError(
                f'{field}={batch} cannot be divided over {data} devices along data; '
                f'choose a multiple of {data} or another config.run.mesh'
            )
    used = jax.devices()[: data * model]
    working, processes = len({device.process_index for device in used}), jax.process_count()
    if working < processes:
        raise UserError(
            f'config.run.mesh: {data} x {model} leaves {processes - working} of {processes} processes '
            f'without a device; start only {working}, or choose another config.run.mesh, or make '
            f'{" and ".join(batches)} divisible by more devices'
        )
    keep_programs()
    return jax.make_mesh(
        (data, model), ('data', 'model'), axis_types=(AxisType.Auto,) * 2, devices=used
    )


def memory(mesh: Mesh) -> int:
    """The memory of a mesh's devices in bytes; for CPUs, that of the machines."""
    device = mesh.local_devices[0]
    stats = device.memory_stats() if device.platform != 'cpu' else None
    if stats and 'bytes_limit' in stats:
        return stats['bytes_limit'] * mesh.size
    return cpu.memory() * jax.process_count()


def describe(mesh: Mesh) -> str:
    """The mesh in one line, for the log."""
    data, model = mesh.shape['data'], mesh.shape['model']
    kind = mesh.devices.flat[0].device_kind
    towers = 'each tower on its own device' if model > 1 else 'the whole network on each device'
    idle = jax.device_count() - mesh.size
    rest = f'; {idle} of {mesh.size + idle} devices idle' if idle > 0 else ''
    return f'mesh: data={data} x model={model} on {data * model} x {kind}, {towers}{rest}'


def rows(mesh: Mesh, batch: int) -> np.ndarray:
    """The rows of a global batch that this process feeds, ascending: i64[b]."""
    indices = NamedSharding(mesh, P('data')).addressable_devices_indices_map((batch,))
    return np.unique(np.concatenate([np.arange(batch)[index] for index in indices.values()]))


def global_batch(mesh: Mesh, batch: int, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows -> arrays over all devices, sharded over `data`."""
    sharding = NamedSharding(mesh, P('data'))
    return {
        name: jax.make_array_from_process_local_data(sharding, x, (batch, *x.shape[1:]))
        for name, x in local.items()
    }


def global_batches(
    mesh: Mesh, batch: int, local: list[dict[str, np.ndarray]]
) -> dict[str, jax.Array]:
    """This process's rows of several batches -> arrays [batches, rows, ...]; for one, `global_batch`."""
    if len(local) == 1:
        return global_batch(mesh, batch, local[0])
    sharding = NamedSharding(mesh, P(None, 'data'))
    stacked = {name: np.stack([one[name] for one in local]) for name in local[0]}
    return {
        name: jax.make_array_from_process_local_data(sharding, x, (len(local), batch, *x.shape[2:]))
        for name, x in stacked.items()
    }


def shardings(mesh: Mesh, specs):
    """A tree of partition specs -> the same tree of shardings."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P))


def place(mesh: Mesh, shapes, specs):
    """Equal trees of shapes and of partition specs -> a tree of jax.ShapeDtypeStructs on the mesh."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings(mesh, specs),
    )
