"""Batches for training and evaluation: images of a store, ordered and cropped by the sampler.

A batch is a pure function of (store, seed, step, rows): there is no iterator state to save, and
starting at any step costs the same. Images stay uint8 here; the device does the arithmetic.
"""

import importlib.util
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import numpy as np

from alexnet_jax.common.errors import UserError
from alexnet_jax.devices.cpu import cores
from alexnet_jax.input import sampler
from alexnet_jax.input.images import resized_crop
from alexnet_jax.input.sources import import_tensorflow
from alexnet_jax.input.store import Jpegs, Store
from alexnet_jax.input.threads import ordered_map

Batch = dict[str, np.ndarray]
# One in this many records of a raw store is checked; a prime, to suit any batch size.
CHECK_EVERY = 127


class Plan(NamedTuple):
    """Describes a batch: each row's record (-1: none, a black image), the corner of its crop and
    whether it is mirrored; `rest` holds the batch entries that need no image."""

    records: np.ndarray  # i64[b]
    y: np.ndarray  # i32[b]
    x: np.ndarray  # i32[b]
    flip: np.ndarray  # bool[b]
    rest: Batch
    checked: np.ndarray  # i64[n], the records to check in a raw store
    resized: np.ndarray | None = None  # `sampler.resized` of each row, instead of a corner
    area: tuple[float, ...] = ()


def train_batches(
    store: Store,
    *,
    seed: int,
    batch: int,
    start: int = 0,
    stop: int,
    rows: np.ndarray | None = None,
    crop: int,
    chunk: int,
    random: bool,
    threads: int = 0,
    area: tuple[float, ...] = (),
    jitter: float = 0.0,
    mixup: float = 0.0,
    mixup_off: float = 0.0,
    reader: str = 'auto',
) -> Iterator[Batch]:
    """Yields this process's rows of the global batches for steps start .. stop - 1.

    Each is {'image': u8[b,crop,crop,3], 'z': f32[b,3], 'label': i32[b]} with b = len(rows). Row i
    of step s is position s * batch + i of `sampler`; `random=False` takes the center crop,
    unmirrored. `chunk`: see `sampler.draws`. `area`: random resized crops of a store of whole images
    (`sampler.box`), for which the reader is always 'threads'. With `jitter`, there is also 'jitter':
    f32[b,3] (`sampler.jitters`); with `mixup`, 'mix': f32[b], the images' shares (`sampler.shares`),
    all 1 from the epoch `mixup_off` on.

    Args:
      rows: indices into the global batch of `batch` rows; None: all of them.
      threads: number of threads that read and decode; 0: one per core.
      reader: 'tf' (tf.data), 'threads' (without TensorFlow) or 'auto' (tf.data if TensorFlow is
        installed). All readers give the same bytes.
    Raises:
      UserError: the crop is larger than the images or, while iterating, a record is damaged: in
        a JPEG store every record is checked, in a raw store every CHECK_EVERY-th position.
    """
    if not 0 < crop <= store.size:
        raise UserError(
            f'a crop of {crop} pixels does not fit the {store.size}-pixel images of {store.path}'
        )
    rows = np.arange(batch) if rows is None else np.asarray(rows, np.int64)
    labels, room = store.labels('train'), store.size - crop

    def plan(step: int) -> Plan:
        first = step * batch
        records = sampler.records(seed, first + rows, len(labels))
        draws = sampler.draws(seed, first, batch, room=room, chunk=chunk)
        y, x, flip, z = (values[rows] for values in draws)
        checked = records[(first + rows) % CHECK_EVERY == 0]
        if not random:
            y, x, flip = np.full_like(y, room // 2), np.full_like(x, room // 2), flip & False
        rest = {'z': z, 'label': labels[records]}
        if mixup:
            off = mixup_off and first >= mixup_off * len(labels)
            mix = np.ones(batch, np.float32) if off else sampler.shares(seed, first, batch, mixup)
            rest['mix'] = mix[rows]
        if jitter:
            rest['jitter'] = sampler.jitters(seed, first, batch, jitter)[rows]
        resized = sampler.resized(seed, first, batch)[rows] if area and random else None
        return Plan(records, y, x, flip, rest, checked, resized, area)

    return _batches(store, 'train', plan, range(start, stop), crop, threads, reader)


def eval_batches(
    store: Store,
    split: str,
    *,
    batch: int,
    rows: np.ndarray,
    threads: int,
    reader: str = 'auto',
) -> Iterator[Batch]:
    """Yields this process's rows of a split's uncropped images, in order, each exactly once.

    Each batch is {'image': u8[b,S,S,3], 'label': i32[b], 'mask': f32[b]}; every process gets
    ceil(N / batch) of them. Rows past the last record are black, with label and mask 0. Arguments
    and errors: see `train_batches`.
    """
    rows, labels = np.asarray(rows, np.int64), store.labels(split)

    def plan(step: int) -> Plan:
        records = step * batch + rows
        there = records < len(labels)
        label = np.where(there, labels[np.where(there, records, 0)], 0)
        rest = {'label': label, 'mask': there.astype(np.float32)}
        checked = records[there & (records % CHECK_EVERY == 0)]
        none = np.zeros(len(rows), np.int32)
        return Plan(np.where(there, records, -1), none, none, none.astype(bool), rest, checked)

    steps = range(-(-len(labels) // batch))
    return _batches(store, split, plan, steps, store.size, threads, reader)


def fake_batches(
    *, batch: int, rows: np.ndarray, crop: int, classes: int, seed: int
) -> Iterator[Batch]:
    """Yields one batch of noise over and over, in the form of `train_batches`; needs no data."""
    rows = np.asarray(rows)
    generators = [np.random.default_rng([seed, row]) for row in rows.tolist()]
    shape = (crop, crop, 3)
    made = {
        'image': np.stack([g.integers(256, size=shape, dtype=np.uint8) for g in generators]),
        'z': sampler.draws(seed, 0, batch, room=0).z[rows],
        'label': np.array([g.integers(classes) for g in generators], np.int32),
    }
    while True:
        yield dict(made)


def _batches(
    store: Store,
    split: str,
    plan: Callable[[int], Plan],
    steps: range,
    crop: int,
    threads: int,
    reader: str,
) -> Iterator[Batch]:
    """Yields the batches of the given steps, using one of the readers."""
    if reader not in ('auto', 'tf', 'threads'):
        raise UserError(f'unknown reader {reader!r}: choose one of auto, tf, threads')
    threads = threads or cores()
    if store.format == 'whole':  # one resampler, Pillow's
        reader = 'threads'
    elif reader == 'auto':
        reader = 'tf' if importlib.util.find_spec('tensorflow') else 'threads'
    if not steps:
        return iter(())
    if reader == 'tf':
        batches = _read_with_tensorflow(store, split, plan, steps, crop, threads)
    else:
        pictures = store.pictures(split)

        def read(step: int) -> Batch:
            planned = plan(step)
            _check(store, split, pictures, planned)
            return _cut(pictures, planned, crop)

        batches = ordered_map(
            read,
            steps,
            threads=threads,
            ahead=threads + 2,
            name='batches',
        )
    return _closed_at_exit(batches)


def _check(store: Store, split: str, pictures: np.ndarray | Jpegs, plan: Plan) -> None:
    """Checks the records of a raw store that a plan names; the others stay unchecked, for speed."""
    if store.format == 'u8':
        for record in plan.checked:
            store.check(split, record, pictures[record])


def _cut(pictures: np.ndarray | Jpegs, plan: Plan, crop: int) -> Batch:
    """Cuts a batch's crops, copying each once; for a raw store, directly from the memory map."""
    whole = isinstance(pictures, np.ndarray) and crop == pictures.shape[1]
    if whole and not plan.flip.any() and (plan.records >= 0).all():
        return {'image': pictures[plan.records], **plan.rest}  # ten times as fast
    image = np.zeros((len(plan.records), crop, crop, 3), np.uint8)
    places = zip(image, plan.records, plan.y, plan.x, plan.flip, strict=True)
    for i, (out, record, y, x, flip) in enumerate(places):
        if record < 0:
            continue
        if plan.resized is None:
            window = pictures[record][y : y + crop, x : x + crop]
        else:
            picture = pictures.whole(record)
            box = sampler.box(plan.resized[i], *picture.size, plan.area)
            window = resized_crop(picture, box, crop)
        if flip:
            for channel in range(3):  # three times as fast as copying window[:, ::-1] at once
                out[..., channel] = window[:, ::-1, channel]
        else:
            out[:] = window
    return {'image': image, **plan.rest}


def _read_with_tensorflow(
    store: Store, split: str, plan: Callable[[int], Plan], steps: range, crop: int, threads: int
) -> Iterator[Batch]:
    """Yields batches through tf.data: read a step, decode its images, batch them, prefetch."""
    tf = import_tensorflow()
    raw = store.format == 'u8'
    pixels = store.pixels(split) if raw else None
    failures = []

    def read(step: np.ndarray) -> tuple[np.ndarray, ...]:
        # TensorFlow reduces exceptions to text, so keep the original for `_iterate` to raise.
        try:
            planned = plan(int(step))
            if raw:
                _check(store, split, pixels, planned)
                return tuple(_cut(pixels, planned, crop).values())
            there = planned.records >= 0
            data = np.full(len(there), b'', object)
            data[there] = store.records(split, planned.records[there])
            return data, planned.y, planned.x, planned.flip, *planned.rest.values()
        except Exception as error:
            failures.append(error)
            raise

    def decode(data, y, x, flip, *rest):
        def picture():
            # libjpeg crops in y only: cropping in x would change the edge columns by a few levels,
            # because chroma is interpolated without their neighbors. Rows are not affected.
            # INTEGER_ACCURATE gives the same pixels as PIL.
            window = tf.stack([y, 0, crop, store.size])
            image = tf.io.decode_and_crop_jpeg(
                data, window, channels=3, dct_method='INTEGER_ACCURATE'
            )[:, x : x + crop]
            return tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)

        def nothing():
            return tf.zeros([crop, crop, 3], tf.uint8)

        image = tf.ensure_shape(tf.cond(data == b'', nothing, picture), [crop, crop, 3])
        return image, *rest

    example = plan(steps[0])
    b, names = len(example.records), ('image', *example.rest)
    rest = [tf.TensorSpec(v.shape, tf.as_dtype(v.dtype)) for v in example.rest.values()]
    if raw:
        specs = [tf.TensorSpec([b, crop, crop, 3], tf.uint8), *rest]
    else:
        kinds = (tf.string, tf.int32, tf.int32, tf.bool)
        specs = [*(tf.TensorSpec([b], kind) for kind in kinds), *rest]

    # TensorFlow never releases a function; this one can release what it holds, the mapped file.
    held = [read]

    def call(step):
        for read in held[:1]:
            return read(step)
        # The iterator has ended, but one of its threads is still running.
        return tuple(
            np.zeros(s.shape, 'S' if s.dtype == tf.string else s.dtype.name) for s in specs
        )

    def read_step(step):
        values = tf.numpy_function(call, [step], [s.dtype for s in specs], stateful=False)
        return tuple(tf.ensure_shape(v, s.shape) for v, s in zip(values, specs, strict=True))

    dataset = tf.data.Dataset.range(steps.start, steps.stop)
    # For a jpg store this only reads the records; they are decoded below.
    dataset = dataset.map(read_step, num_parallel_calls=threads if raw else 2)
    if not raw:
        dataset = dataset.unbatch().map(decode, num_parallel_calls=threads)
        dataset = dataset.batch(b, drop_remainder=True)
    dataset = dataset.map(lambda *values: dict(zip(names, values, strict=True))).prefetch(2)
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    return _iterate(dataset.with_options(options), held, failures, tf.errors.OpError)


def _iterate(
    dataset, held: list, failures: list[Exception], op_error: type[Exception]
) -> Iterator[Batch]:
    """Yields a dataset's elements, and re-raises exceptions of its functions in their original form.

    held: what those functions need until the end.
    """
    elements = dataset.as_numpy_iterator()
    try:
        yield from elements
    except op_error:
        if failures:
            raise failures[0] from None
        raise
    finally:
        del elements  # ends its threads
        held.clear()


def _closed_at_exit(batches: Generator) -> Generator:
    """Returns the reader, set up to close, along with its threads, before the interpreter exits.

    TensorFlow's threads call into Python; if they do so during interpreter shutdown, it hangs or
    aborts, and nothing else closes a generator that is still referenced by then.
    """
    # A weak reference, so that a reader that is no longer used is closed and forgotten immediately.
    weakref.finalize(batches, _close, weakref.ref(batches))
    return batches


def _close(reference: weakref.ref) -> None:
    batches = reference()
    if batches is not None:
        batches.close()
