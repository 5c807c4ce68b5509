"""AlexNet in JAX, faithful to the paper of 2012 and to its source. See README.md."""

__version__ = '0.1.0'


def load(run_dir, views: str = 'ten', step: str | int = 'latest'):
    """A trained network as a function from uint8 pictures to probabilities: `evaluate.load`."""
    from alexnet_jax import evaluate  # not at import: nothing may start JAX before flags are read

    return evaluate.load(run_dir, views, step)
