"""Small sources of images for tests: encoded images, class folders, and miniature ImageNet tars."""

import importlib.util
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, width: int = 60, height: int = 45) -> Image.Image:
    """A smooth random RGB image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, format: str = 'JPEG') -> bytes:
    """An image as the bytes of a file."""
    data = io.BytesIO()
    image.save(data, format)
    return data.getvalue()


def write_tree(tree: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """Writes tree/CLASS/NUMBER.jpg, with `counts` images per class, in several sizes."""
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


def imagenet_labels() -> list[str]:
    """The WordNet IDs of the validation images in the order of their numbers, as TFDS ships them."""
    (package,) = importlib.util.find_spec('tensorflow_datasets').submodule_search_locations
    return (Path(package) / 'datasets/imagenet2012/validation_labels.txt').read_text().split()


def write_imagenet_tars(
    folder: Path, *, per_class: int = 4, val: int = 10, width: int = 80
) -> dict:
    """Writes the two tars of a miniature ImageNet, with a CMYK and a PNG file among them.

    Classes and files are in no particular order.
    Returns {'train': {file name: wnid}, 'val': {file name: wnid}}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train = {}
    with tarfile.open(folder / 'ILSVRC2012_img_train.tar', 'w') as outer:
        for seed, special in enumerate((PNG, 'n01440764_1.JPEG', CMYK)):
            wnid = special.split('_')[0]
            names = [f'{wnid}_{10000 + i}.JPEG' for i in range(per_class - 1)] + [special]
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode='w') as tar:
                for number, name in enumerate(names):
                    image = picture(50 * seed + number, width, width * 3 // 4)
                    if name == CMYK:
                        image = image.convert('CMYK')
                    _add(tar, name, encode(image, 'PNG' if name == PNG else 'JPEG'))
                    train[name] = wnid
            _add(outer, f'{wnid}.tar', inner.getvalue())
    numbers = [n for n, wnid in enumerate(imagenet_labels(), 1) if wnid in train.values()][:val]
    names = {f'ILSVRC2012_val_{n:08}.JPEG': imagenet_labels()[n - 1] for n in numbers}
    with tarfile.open(folder / 'ILSVRC2012_img_val.tar', 'w') as tar:
        for number, name in enumerate(names):
            _add(tar, name, encode(picture(1000 + number, width, width * 3 // 4)))
    return {'train': train, 'val': names}


def unpack_imagenet(tars: Path, root: Path, form: str) -> Path:
    """Unpacks the tars of `write_imagenet_tars` in the layout of a distribution -> the folder to point at.

    Form: listing that it follows

    - flat: `tar -x` of the three kinds of tars (image-net.org; the first half of
      github.com/pytorch/examples, imagenet/extract_ILSVRC.sh)
    - class_tars: the same script, before it unpacks the tars in train/
    - torchvision: the end of the same script, and `torchvision.datasets.ImageNet` with its meta.bin
    - kaggle: kaggle.com/competitions/imagenet-object-localization-challenge/data
    """
    top = root / 'ILSVRC/Data/CLS-LOC' if form == 'kaggle' else root
    with tarfile.open(tars / 'ILSVRC2012_img_train.tar') as outer:
        outer.extractall(top / 'train', filter='data')
    if form != 'class_tars':
        for packed in sorted((top / 'train').iterdir()):
            with tarfile.open(packed) as inner:
                inner.extractall(packed.with_suffix(''), filter='data')
            packed.unlink()
    with tarfile.open(tars / 'ILSVRC2012_img_val.tar') as tar:
        tar.extractall(top / 'val', filter='data')
    labels = {
        path.stem: imagenet_labels()[int(path.stem[-8:]) - 1] for path in (top / 'val').iterdir()
    }
    if form == 'torchvision':
        (root / 'meta.bin').write_bytes(b'')
        for name, wnid in labels.items():
            (top / 'val' / wnid).mkdir(exist_ok=True)
            (top / 'val' / f'{name}.JPEG').rename(top / 'val' / wnid / f'{name}.JPEG')
    if form == 'kaggle':
        (top / 'test').mkdir()
        (top / 'test/ILSVRC2012_test_00000001.JPEG').write_bytes(encode(picture(1)))
        for folder in ('Annotations/CLS-LOC/val', 'ImageSets/CLS-LOC'):
            (root / 'ILSVRC' / folder).mkdir(parents=True)
        (root / 'LOC_synset_mapping.txt').write_text('n01440764 tench, Tinca tinca\n')
        boxes = '85 1 499 272 n03995372 131 0 499 254 '
        rows = [f'{name},{wnid} {boxes}\n' for name, wnid in reversed(labels.items())]
        (root / 'LOC_val_solution.csv').write_text('ImageId,PredictionString\n' + ''.join(rows))
    return root


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))
