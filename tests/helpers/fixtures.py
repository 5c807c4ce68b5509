"""Small sources of pictures for tests: encoded pictures, class folders, and miniature ImageNet tars."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, width: int = 60, height: int = 45) -> Image.Image:
    """A smooth random RGB picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, format: str = 'JPEG') -> bytes:
    """A picture as the bytes of a file."""
    data = io.BytesIO()
    image.save(data, format)
    return data.getvalue()


def write_tree(tree: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """Writes tree/CLASS/NUMBER.jpg, with `counts` pictures per class, in several sizes."""
    for label, (name, count) in enumerate(counts.items()):
        (tree / name).mkdir(parents=True)
        for number in range(count):
            image = picture(
                seed + 500 * label + number, 50 + 7 * (number % 9), 60 - 3 * (number % 9)
            )
            (tree / name / f'{number:03}.jpg').write_bytes(encode(image))
    return tree


# TFDS fixes these two files of the real set; the miniature set has them too.
CMYK = 'n01739381_1309.JPEG'
PNG = 'n02105855_2933.JPEG'


def write_imagenet_tars(
    folder: Path, *, per_class: int = 4, val: int = 10, width: int = 80
) -> dict:
    """Writes the two tars of a miniature ImageNet, with a CMYK and a PNG file among them.

    Returns {'train': {file name: wnid}, 'val': [file names, sorted]}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train = {}
    with tarfile.open(folder / 'ILSVRC2012_img_train.tar', 'w') as outer:
        for seed, special in enumerate(('n01440764_1.JPEG', CMYK, PNG)):
            wnid = special.split('_')[0]
            names = [special] + [f'{wnid}_{10000 + i}.JPEG' for i in range(per_class - 1)]
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode='w') as tar:
                for number, name in enumerate(names):
                    image = picture(50 * seed + number, width, width * 3 // 4)
                    if name == CMYK:
                        image = image.convert('CMYK')
                    _add(tar, name, encode(image, 'PNG' if name == PNG else 'JPEG'))
                    train[name] = wnid
            _add(outer, f'{wnid}.tar', inner.getvalue())
    names = [f'ILSVRC2012_val_{number:08}.JPEG' for number in range(1, val + 1)]
    with tarfile.open(folder / 'ILSVRC2012_img_val.tar', 'w') as tar:
        for number, name in enumerate(names):
            _add(tar, name, encode(picture(1000 + number, width, width * 3 // 4)))
    return {'train': train, 'val': names}


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))
