"""What a person sees of a running training: the line of an interval, and a picture of conv1."""

import contextlib
import time

import numpy as np

from alexnet_jax.training import metrics

TIMES = ('images_per_second', 'waiting')  # the values of a train row that differ between two runs


class Clock:
    """Where the wall time of an interval goes: waiting for data, evaluating (left out), training."""

    def __init__(self):
        self._reset()

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._waited = self._paused = 0.0

    @contextlib.contextmanager
    def waiting(self):
        """Around what waits for the input."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self):
        """Around what is not training."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def interval(self, images: float) -> dict[str, float]:
        """Ends an interval of so many images: images/s, and the share of time waiting for data."""
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        values = {'images_per_second': images / seconds, 'waiting': self._waited / seconds}
        self._reset()
        return values


def line(step: int, total: int, batch: int, values: dict[str, float]) -> str:
    """The line that tells of an interval; values: those of the train row, times included."""
    left = (total - step) * batch / values['images_per_second']
    hours, minutes = divmod(int(left) // 60, 60)
    to_go = f'{hours}h{minutes:02d}m' if hours else f'{minutes}m{int(left) % 60:02d}s'
    return (
        f'step {step:,}/{total:,}  epoch {values["epoch"]:.2f}  {metrics.line(values)}  '
        f'rate {values["weights"]:.2g}  {values["images_per_second"]:,.0f} images/s  '
        f'waiting {100 * values["waiting"]:.0f} %  {to_go} to go'
    )


def kernel_picture(kernels: np.ndarray, *, scale: int = 1, per_kernel: bool = False) -> np.ndarray:
    """Kernels f32[T,h,w,3,C] -> u8[H,W,3], 16 in a row, the towers one below the other (Fig. 3).

    One rescaling from the least to the greatest weight of all, as in the source (`docs/original.md` §7);
    white lines between kernels, and half a kernel of white between towers.

    Args:
      scale: pixels of the picture along the side of a weight.
      per_kernel: the source's option: first every kernel is given mean 0 and standard deviation 1.
    """
    if per_kernel:
        centred = kernels - kernels.mean((1, 2, 3), keepdims=True)
        kernels = centred / np.maximum(centred.std((1, 2, 3), keepdims=True), 1e-30)
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
