"""AlexNet in JAX, faithful to the 2012 paper and its source code. See README.md."""

__version__ = '0.1.0'


def load(run_dir, views: str = 'ten', step: str | int = 'latest', **build):
    """Loads a trained network as a function from images to probabilities, with `names`, one per class.

    A named network is downloaded on first use and cached.

    classify(image) -> f32[K], classify(images) -> f32[B,K]; classify.features(images, layer='fc7').
    An image is a path, a PIL image, or an array [H,W], [H,W,1], [H,W,3] or [H,W,4], uint8 or floats from
    0 to 1 (`training.inference.Classifier`).

    Args:
      run_dir: a run directory, a bundle, a name such as 'squeezenet' or 'torchvision/alexnet' (python -m
        alexnet_jax.hub list), hf://USER/REPO[@REVISION], or https://...#sha256=...
      views: 'ten' crops or only the 'center' one.
      step: 'best', 'latest' or a number.
      build: makes the network from the fields of `config.model`, for networks defined elsewhere.
    Raises:
      UserError: there is no such network, it cannot be downloaded, or its weights are missing or damaged.
    """
    # Imported here because JAX must not start before the flags are read.
    from alexnet_jax.training import inference

    return inference.load(run_dir, views, step, **build)
