"""AlexNet in JAX, faithful to the paper of 2012 and to its source. See README.md."""

__version__ = '0.1.0'


def load(run_dir, views: str = 'ten', step: str | int = 'latest', **build):
    """A trained network as a function from uint8 images to probabilities.

    Arguments and errors: see `training.inference.load`.
    """
    # Imported late: nothing may start JAX before the flags are read.
    from alexnet_jax.training import inference

    return inference.load(run_dir, views, step, **build)
