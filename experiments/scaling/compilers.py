"""XLA's own compilers for TPUs and NVIDIA GPUs, which need no device: chips, and meshes of devices that
are not present.

They are optional: `pip install -r requirements-compilers.txt`.
"""

import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from alexnet_jax.common.errors import UserError, one_line
from alexnet_jax.common.quiet import quiet
from experiments.scaling.accelerators import ACCELERATORS


class Chip(NamedTuple):
    """The vendor's public figures of one accelerator; memory: of GPUs, as CUDA reports it."""

    platform: str  # JAX's name
    flops: float  # FLOP/s of dense bfloat16 products
    bandwidth: float  # bytes/s of its memory
    memory: float  # bytes
    float32: float = 0.0  # FLOP/s of dense float32 products, in TF32; 0: unknown
    # Hz, of the compiler's cycles, inferred: FLOP/s / (2 x multipliers); 0: it gives none
    clock: float = 0.0
    multipliers: str = ''  # in words

    def peak(self, dtype: str) -> float:
        """FLOP/s of dense products in a dtype of the config, 0 if unknown."""
        return self.flops if dtype == 'bfloat16' else self.float32


CHIPS = {
    'v5e': Chip(
        'tpu', ACCELERATORS['v5e'].peak, 819e9, 16e9, clock=1.5e9, multipliers='4 of 128 x 128'
    ),
    'v5p': Chip('tpu', 459e12, 2765e9, 95e9, clock=1.75e9, multipliers='8 of 128 x 128'),
    'v6e': Chip(
        'tpu',
        918e12,
        1640e9,
        32e9,
        clock=1.75e9,
        multipliers='4 of 256 x 256; uncertain, since Google says 2',
    ),
    'h100': Chip('cuda', ACCELERATORS['h100'].peak, 3352e9, 85e9, ACCELERATORS['h100'].peak / 2),
    'h200': Chip('cuda', ACCELERATORS['h100'].peak, 4800e9, 151e9, ACCELERATORS['h100'].peak / 2),
}
MOST = 10_000  # devices; a pod of v5p has 8,960
MODULES = {'tpu': 'libtpu', 'cuda': 'jax_cuda13_plugin'}
# What the compiler must know about a GPU: CUDA's limits for compute capability 9.0, of the SXM cards.
HOPPER = """
gpu_device_info {{
  name: "{name}"  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  l2_cache_size: 52428800  memory_bandwidth: {bandwidth:.0f}  device_memory_size: {memory:.0f}
  device_address_bits: 64  pcie_bandwidth: 34359738368  device_interconnect_info {{ active_links: 18 }}
  driver_version: "13.0.0"  runtime_version: "13.0.0"  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"  device_description_str: "{name}"  dnn_version_info {{ major: 9 minor: 10 }}
"""


def configure() -> None:
    """Prepares this process for the compilers, before JAX starts."""
    os.environ.update(TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1')
    os.environ['JAX_SKIP_CUDA_CONSTRAINTS_CHECK'] = '1'
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    # Autotuning is off, since kernels cannot be timed here.
    flags = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = f'{flags} --xla_gpu_autotune_level=0'.strip()
    jax.config.update('jax_platforms', 'cpu')


def parse(topology: str) -> tuple[str, Chip, int]:
    """Reads CHIP:SHAPE, as in v5e:16x16 or h100:8 -> (name, chip, devices); UserError if it is not one."""
    match = re.fullmatch(r'(\w+):([1-9]\d*(?:x[1-9]\d*)*)', topology)
    if not match or match[1] not in CHIPS:
        raise UserError(
            f'--topology={topology}: not CHIP:SHAPE, as in v5e:2x2, v5p:2x2x1 or h100:8; the chips are '
            f'{", ".join(CHIPS)}'
        )
    count = math.prod(int(n) for n in match[2].split('x'))
    if count > MOST:
        raise UserError(f'--topology={topology}: must have at most {MOST:,} devices')
    return match[1], CHIPS[match[1]], count


def make_mesh(topology: str, shape: tuple[int, int]) -> Mesh:
    """Returns a (data, model) mesh of the first devices of a topology, none of which need be present.

    Raises UserError if it has fewer, or if the compiler is not installed or does not know the topology.
    """
    name, chip, count = parse(topology)
    if np.prod(shape) > count:
        raise UserError(
            f'--topology={topology}: has {count} devices, fewer than --mesh={shape[0]},{shape[1]}'
        )
    if not importlib.util.find_spec(MODULES[chip.platform]):
        raise UserError(
            f'--topology={topology}: needs {MODULES[chip.platform]}; install '
            'requirements-compilers.txt, preferably in a separate environment'
        )
    options = {'topology_name': topology}
    if chip.platform == 'cuda':
        title = f'NVIDIA {name.upper()} SXM'
        target = HOPPER.format(name=title, bandwidth=chip.bandwidth, memory=chip.memory)
        options = {'topology_name': '', 'topology': f'1x1x{count}', 'target_config': target}
    try:
        with quiet():  # libtpu looks for the machine of a TPU
            found = topologies.get_topology_desc(platform=chip.platform, **options)
    except (RuntimeError, ValueError) as error:
        hint = '; for one TPU: v5e:2x2, v6e:2x2 or v5p:2x2x1, with --mesh=1,1'
        raise UserError(
            f'--topology={topology}: {one_line(error)}{hint if chip.platform == "tpu" else ""}'
        ) from error
    devices = np.array(found.devices[: np.prod(shape)]).reshape(shape)
    return Mesh(devices, ('data', 'model'), axis_types=(AxisType.Auto,) * 2)


def compile(lowered: jax.stages.Lowered, topology: str) -> jax.stages.Compiled:
    """Compiles a program for devices that are not present.

    Raises UserError if the compiler cannot, for lack of memory, for example.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f'--topology={topology}: {one_line(error)}') from error
