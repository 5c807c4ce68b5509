"""Writes small stores independently of prepare.py: `from tests.helpers.stores import write_store`."""

import io
import json
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def encode(picture: np.ndarray) -> bytes:
    """An image u8[H,W,3] as a JPEG record."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, 'JPEG', quality=95)
    return buffer.getvalue()


def decode(record: bytes) -> np.ndarray:
    """A JPEG record as u8[H,W,3]."""
    return np.asarray(Image.open(io.BytesIO(record)).convert('RGB'))


def write_store(
    path: Path,
    *,
    format: str = 'jpg',
    size: int = 40,
    classes: int = 3,
    counts: dict[str, int] | None = None,
    seed: int = 0,
    pictures: dict[str, np.ndarray] | None = None,
    labels: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Writes a store of smooth random images (or of `pictures` u8[N,size,size,3] by split).

    Returns the images by split as a reader must return them: decoded, for a JPEG store.
    """
    counts = {s: len(p) for s, p in pictures.items()} if pictures else counts or {}
    counts = counts or {'train': 20, 'val': 7}
    rng = np.random.default_rng(seed)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    result = {}
    for split, count in counts.items():
        if pictures:
            made = pictures[split]
        else:
            coarse = rng.integers(256, size=(count, 6, 6, 3), dtype=np.uint8)
            made = np.stack([np.asarray(Image.fromarray(p).resize((size, size))) for p in coarse])
        encoded = [encode(p) if format == 'jpg' else p.tobytes() for p in made]
        (path / f'{split}.{format}').write_bytes(b''.join(encoded))
        if format == 'jpg':
            made = np.stack([decode(r) for r in encoded])
            ends = np.cumsum([0, *map(len, encoded)])
            np.save(path / f'{split}.offsets.npy', ends.astype(np.int64))
        np.save(path / f'{split}.crc.npy', np.array([zlib.crc32(r) for r in encoded], np.uint32))
        chosen = labels[split] if labels else np.arange(count) % classes
        np.save(path / f'{split}.labels.npy', np.asarray(chosen, np.int32))
        result[split] = made
    pixels = result['train'].astype(np.float64)
    variances, vectors = np.linalg.eigh(np.cov(pixels.reshape(-1, 3).T))
    vectors = vectors * np.where(vectors.sum(0) < 0, -1, 1)
    np.savez(
        path / 'stats.npz',
        mean=pixels.mean(0).astype(np.float32),
        eigenvectors=vectors[:, ::-1].astype(np.float32),
        sigma=np.sqrt(np.maximum(variances[::-1], 0)).astype(np.float32),
    )
    (path / 'names.txt').write_text(''.join(f'class {k}\n' for k in range(classes)))
    info = dict(format=format, size=size, filter='none', classes=classes, counts=counts)
    info |= dict(source='made_up', versions={}, complete=True)
    (path / 'store.json').write_text(json.dumps(info))
    return result
