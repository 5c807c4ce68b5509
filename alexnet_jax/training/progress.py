"""What a training run shows while it runs: a log line per interval, and an image of conv1."""

import contextlib
import time

import numpy as np

from alexnet_jax.common.errors import printable
from alexnet_jax.input.store import Store
from alexnet_jax.training import metrics

TIMES = ('images_per_second', 'waiting')  # values of a train row that differ from run to run
QUIET = 30.0  # seconds without a log line
IMBALANCE = 100  # warn if the largest class has this many times the images of the smallest
TRAINS = (0.02, 1.0)  # rate / (1 - momentum) per 256 images
TUNES = (0.005, 0.05)  # the same in fine-tuning
UNUSUAL = (TRAINS[0] / 4, TRAINS[1] * 4)  # beyond these, a warning


def data_lines(store: Store, *, batch: int, total: int) -> list[str]:
    """Describes what a run trains on, in several lines; total: its maximum number of steps."""
    counts = np.bincount(store.labels('train'), minlength=store.classes)
    few, many = int(counts.argmin()), int(counts.argmax())
    images, held_out = store.counts['train'], store.counts['val']
    origin = f' ({store.validation})' if store.validation else ''
    each = f'{counts[few]:,} ({store.names[few]}) to {counts[many]:,} ({store.names[many]})'
    if counts[few] == counts[many]:
        each = f'{counts[few]:,}'
    return [
        printable(line)
        for line in (
            f'data: {store.source}, in the store {store.path}',
            f'classes: {store.classes:,}, with {each} training images each',
            f'images: {images:,} for training, {held_out:,} for validation{origin}',
            f'steps: {images / batch:,.1f} per epoch, at most {total:,} in all, '
            f'{total * batch / images:,.1f} epochs',
        )
    ]


def data_warning(store: Store, *, batch: int) -> str:
    """Returns what is unusual about a dataset, '' if nothing is."""
    counts = np.bincount(store.labels('train'), minlength=store.classes)
    images, few, many = store.counts['train'], int(counts.min()), int(counts.max())
    found = []
    if batch > images:
        found.append(
            f'a batch of {batch:,} repeats the {images:,} training images; set a smaller '
            'config.train.batch, and config.optim.rate in proportion'
        )
    if store.classes == 1:
        found.append('there is only one class, so there is nothing to learn')
    if empty := int((counts == 0).sum()):
        found.append(f'{empty:,} of the {store.classes:,} classes have no training images')
    elif many > IMBALANCE * few:
        found.append(f'the largest class has {many:,} images and the smallest {few:,}')
    return '; '.join(found)


def rate_warning(optim, *, batch: int, tuned: bool = False) -> str:
    """Returns why the rate of a config's `optim` is unlikely to train a network, '' if it looks right.

    What counts is rate / (1 - momentum) per 256 images: published recipes of these networks have 0.02 to
    1.25, and in a random search over AlexNet's, 0.05 to 0.3 did best. tuned: the network starts from
    another one's weights, for which 0.005 to 0.05 did best (`experiments.few_labels`).
    """
    if optim.name != 'sgd' or not optim.rate:
        return ''
    scale = (1 - optim.momentum) * batch / 256
    effective = optim.rate / scale
    if tuned and effective > 2 * TUNES[1]:
        return (
            f'config.optim.rate={optim.rate}: may destroy what the network of config.train.init_from '
            'has learned; '
            f'with batches of {batch:,}, try {sum(TUNES) / 2 * scale:.2g} (rate / (1 - momentum) is '
            f'{effective:.3g} per 256 images, and {TUNES[0]} to {TUNES[1]} did best in fine-tuning)'
        )
    if tuned or UNUSUAL[0] <= effective <= UNUSUAL[1]:
        return ''
    many = effective > UNUSUAL[1]
    return (
        f'config.optim.rate={optim.rate}: {"the loss may diverge" if many else "training may be very slow"};'
        f' with batches of {batch:,}, try {TRAINS[many] * scale:.2g} '
        f'(rate / (1 - momentum) is {effective:.3g} per 256 images, and such networks train with '
        f'{TRAINS[0]} to {TRAINS[1]})'
    )


class Clock:
    """Measures where an interval's wall time goes: waiting for data, or training (not evaluation)."""

    def __init__(self):
        self._reset()

    def _reset(self) -> None:
        self._start = self._said = time.perf_counter()
        self._waited = self._paused = self._once = 0.0

    @contextlib.contextmanager
    def waiting(self):
        """Times a block that waits for input."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self):
        """Excludes a block that is not training."""
        start = time.perf_counter()
        yield
        self.said()  # evaluations have their own line
        self._paused += self._said - start

    @contextlib.contextmanager
    def once(self):
        """Times a block that will not be repeated, such as compilation; yields its list of seconds."""
        start, seconds = time.perf_counter(), []
        yield seconds
        seconds.append(time.perf_counter() - start)
        self._once += seconds[0]

    def said(self) -> None:
        """Notes that a line has just been logged."""
        self._said = time.perf_counter()

    def interval(self, images: float) -> tuple[dict[str, float], float]:
        """Ends an interval of `images` images.

        Returns images/s, the fraction of time waiting, and images/s without one-time costs.
        """
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        values = {'images_per_second': images / seconds, 'waiting': self._waited / seconds}
        steady = images / max(seconds - self._once, 1e-9)
        self._reset()
        return values, steady

    def overdue(self, images: float, left: int) -> float:
        """Returns images/s so far, without one-time costs, if a line is due; else 0.

        One is due if neither the last line nor the next, after `left` more images, is within `QUIET` seconds.
        """
        now = time.perf_counter()
        steady = images / max(now - self._start - self._paused - self._once, 1e-9)
        if min(now - self._said, left / steady) < QUIET:
            return 0.0
        self._said = now
        return steady


def first_line(step: int, total: int, loss: float, compiled: float) -> str:
    """Formats the line after a start's first dispatch; compiled: seconds."""
    return f'step {step:,} of {total:,}: loss {loss:.4f}, compiled in {compiled:.0f} s'


def line(
    step: int, total: int, batch: int, classes: int, values: dict[str, float], steady: float
) -> str:
    """Formats an interval's log line.

    values: those of the train row, times included; steady: images/s from here on.
    """
    return (
        f'step {step:,}/{total:,}  epoch {values["epoch"]:.2f}  {metrics.line(values, classes)}  '
        f'rate {values["weights"]:.2g}  {values["images_per_second"]:,.0f} images/s  '
        f'waiting {100 * values["waiting"]:.0f}%  {_to_go((total - step) * batch, steady)}'
    )


def short_line(step: int, total: int, batch: int, steady: float) -> str:
    """Formats a log line within a long interval; steady: images/s."""
    return (
        f'step {step:,}/{total:,}  {steady:,.0f} images/s  {_to_go((total - step) * batch, steady)}'
    )


def _to_go(images: int, steady: float) -> str:
    seconds = int(images / steady)
    hours, minutes = divmod(seconds // 60, 60)
    return f'{hours}h{minutes:02d}m to go' if hours else f'{minutes}m{seconds % 60:02d}s to go'


def kernel_picture(kernels: np.ndarray, *, scale: int = 1, per_kernel: bool = False) -> np.ndarray:
    """Draws kernels f32[T,h,w,3,C] -> u8[H,W,3], 16 per row, one tower below the other (Fig. 3).

    All weights are rescaled together, from the smallest to the largest, as in the 2012 source code
    (`docs/original.md` §7). White lines separate kernels, and half a kernel of white separates towers.

    Args:
      scale: the side of a weight, in pixels of the image.
      per_kernel: first normalize each kernel to mean 0 and standard deviation 1, an option of the
        2012 source code.
    """
    if per_kernel:
        centered = kernels - kernels.mean((1, 2, 3), keepdims=True)
        kernels = centered / np.maximum(centered.std((1, 2, 3), keepdims=True), 1e-30)
    low, high = kernels.min(), kernels.max()
    scaled = np.uint8(np.round(255 * (kernels - low) / max(high - low, 1e-30)))
    scaled = scaled.repeat(scale, 1).repeat(scale, 2)
    towers, h, w, _, count = scaled.shape
    line, gap, columns = scale, h // 2, min(count, 16)
    tower_height = -(-count // 16) * (h + line) + line
    height = towers * tower_height + (towers - 1) * gap
    picture = np.full((height, columns * (w + line) + line, 3), 255, np.uint8)
    for tower in range(towers):
        top = tower * (tower_height + gap)
        for i in range(count):
            y, x = top + i // 16 * (h + line) + line, i % 16 * (w + line) + line
            picture[y : y + h, x : x + w] = scaled[tower, ..., i]
    return picture
