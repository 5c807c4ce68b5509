"""Every test sees eight CPU devices, set up as the commands do, and no silent rank promotion."""

import jax

from alexnet_jax import mesh

mesh.configure(cpu_devices=8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
