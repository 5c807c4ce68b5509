"""AlexNet in JAX, faithful to the 2012 paper and its source code. See README.md."""

__version__ = '0.1.0'


def load(run_dir, views: str = 'ten', step: str | int = 'latest', **build):
    """Loads a trained network as a function from images to probabilities.

    For arguments and errors, see `training.inference.load`; for images, its class `Classifier`.
    """
    # Imported here because JAX must not start before the flags are read.
    from alexnet_jax.training import inference

    return inference.load(run_dir, views, step, **build)
