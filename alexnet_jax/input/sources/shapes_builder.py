"""The built-in dataset as a TFDS builder, `alexnet_shapes`: rendered locally, with nothing to download.

Imported only when a TFDS set is opened, because it needs TFDS to define its class.
"""

import io

import numpy as np
import tensorflow_datasets as tfds

from alexnet_jax.input.sources import shapes


class AlexnetShapes(tfds.core.GeneratorBasedBuilder):
    """Ten classes of JPEG images of varying size: 2000 for training, 1000 for validation."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=shapes.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    'image': tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg'),
                    'label': tfds.features.ClassLabel(names=shapes.NAMES),
                    # x0, y0, x1, y1 in 0..1
                    'box': tfds.features.Tensor(shape=(4,), dtype=np.float32),
                }
            ),
            supervised_keys=('image', 'label'),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        return {name: self._generate_examples(*split) for name, split in shapes.SPLITS.items()}

    def _generate_examples(self, split, count):
        for index in range(count):
            data, label, box = shapes.render(shapes.SEED, split, index)
            yield index, {'image': io.BytesIO(data), 'label': label, 'box': box}
