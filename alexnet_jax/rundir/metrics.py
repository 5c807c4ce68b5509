"""The metrics of a run: `metrics.jsonl`, one JSON object per row, and its TensorBoard mirror."""

import contextlib
import io
import json
import math
import os
import socket
import tempfile
import time
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer import record_writer

from alexnet_jax.common import paths
from alexnet_jax.common.errors import UserError, reason

FILE = 'metrics.jsonl'


class Writer:
    """Appends rows to `<workdir>/metrics.jsonl` and mirrors them in `<workdir>/tensorboard/`.

    A run that resumes at step `start` repeats everything after it. Opening therefore removes, in one
    atomic replacement, the train rows of steps >= start (row s is the update from s to s + 1), all
    other rows of steps > start (or >= start, unless `evaluated`: step `start` was evaluated), and a
    torn last line; a start of -1 removes every row. The
    TensorBoard files are only a mirror: they keep the events of removed rows, so repeated steps
    appear twice.

    Floats are written in the shortest form that reads back to the same bits. NaN and infinities,
    which JSON lacks, become null. A Writer that is not `active` (every process but the first) does
    nothing. Raises UserError if any line of the file but the last is not a row.

    Objects in a bucket cannot be appended to, so there both files grow in a local temporary folder,
    and `sync` and `close` write them to the bucket whole.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        start: int,
        evaluated: bool = True,
        active: bool = True,
    ):
        self._active = active
        if not active:
            return
        folder = self._workdir = paths.path(workdir)
        self._scratch = None
        if paths.is_remote(folder):
            self._scratch = tempfile.TemporaryDirectory()
            folder = paths.Path(self._scratch.name)
            (folder / FILE).write_bytes(b''.join(line for line, _ in _rows(self._workdir / FILE)))
        folder.mkdir(parents=True, exist_ok=True)
        _remove_repeated(folder / FILE, start, evaluated)
        self._file = open(folder / FILE, 'a', encoding='utf-8')
        self._events = _Events(folder / 'tensorboard')

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Writes the row {'kind': kind, 'step': step, **values}, which is on disk when this returns.

        A value is a number (Python, NumPy or a scalar array), a string, or a list or dict of these.
        TensorBoard gets the numbers, as '<kind>/<name>'.
        """
        if not self._active:
            return
        row = {'kind': kind, 'step': int(step), **_plain(values)}
        scalars = [(name, math.nan if row[name] is None else row[name]) for name in values]
        try:
            self._file.write(json.dumps(row, allow_nan=False) + '\n')
            self._file.flush()
            os.fsync(self._file.fileno())  # no checkpoint without the rows before it
            self._events.add(
                row['step'],
                [
                    summary_pb2.Summary.Value(tag=f'{kind}/{name}', simple_value=value)
                    for name, value in scalars
                    if isinstance(value, (int, float))
                ],
            )
        except OSError as error:
            raise UserError(
                f'{self._file.name}: cannot be written ({reason(error)}); run the same command '
                'again to resume from the last checkpoint'
            ) from error

    def image(self, name: str, step: int, image: np.ndarray) -> None:
        """Adds an image u8[H,W,3] to TensorBoard under `name`."""
        if not self._active:
            return
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f'{name} is {image.dtype}{list(image.shape)}, not uint8[H, W, 3]')
        png = io.BytesIO()
        Image.fromarray(np.asarray(image)).save(png, 'png')
        height, width, _ = image.shape
        picture = summary_pb2.Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=png.getvalue()
        )
        self._events.add(int(step), [summary_pb2.Summary.Value(tag=name, image=picture)])

    def sync(self) -> None:
        """Call this before saving a checkpoint, which must not exist without the rows before it."""
        if not self._active or self._scratch is None:  # on disk the rows are there already
            return
        folder = paths.Path(self._scratch.name)
        try:
            for file in (self._file, self._events.file):
                there = self._workdir / paths.Path(file.name).relative_to(folder)
                paths.replace(there, paths.Path(file.name).read_bytes())
        except Exception as error:
            raise UserError(
                f'{there}: cannot be written ({reason(error)}); run the same command '
                'again to resume from the last checkpoint'
            ) from error

    def close(self) -> None:
        """Closes both files; further calls do nothing."""
        if self._active:
            with contextlib.suppress(UserError):  # only rows after the last checkpoint
                self.sync()
            self._active = False
            for file in (self._file, self._events):
                with contextlib.suppress(OSError):  # a row that could not be written
                    file.close()
            if self._scratch is not None:
                self._scratch.cleanup()


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads the rows of `<workdir>/metrics.jsonl` in order, null as None; [] if there is no file.

    Skips a torn last line (the run was killed while writing it, or is writing it now). Raises
    UserError if any other line is not a row.
    """
    return [row for _, row in _rows(paths.path(workdir) / FILE)]


def _rows(path: paths.Path) -> list[tuple[bytes, dict[str, Any]]]:
    """(line, row) of every complete line."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            whole = line.endswith(b'\n') and isinstance(row['kind'], str)
            whole = whole and isinstance(row['step'], int)
        except (ValueError, KeyError, TypeError):
            whole = False
        if whole:
            rows.append((line, row))
        elif number < len(lines):
            raise UserError(f'{path}: line {number} is not a row of metrics; repair or remove it')
    return rows


def _remove_repeated(path: paths.Path, start: int, evaluated: bool) -> None:
    kept = [
        line
        for line, row in _rows(path)
        if row['step'] < start or (evaluated and row['step'] == start and row['kind'] != 'train')
    ]
    content = b''.join(kept)
    if not path.exists() or content == path.read_bytes():
        return
    paths.replace(path, content)


def _plain(value: Any) -> Any:
    """Converts a value to JSON types, with None for numbers that JSON lacks."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, 'dtype'):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class _Events:
    """A TensorBoard file, written without TensorFlow.

    tensorboard's EventFileWriter imports TensorFlow (seconds) if it is installed, and
    clu.metric_writers needs it. Writing the records directly needs neither and is the same everywhere.
    """

    def __init__(self, folder: paths.Path):
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in order of their names, so the time comes first.
        name = f'events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}'
        self.file = open(folder / name, 'xb')
        self._records = record_writer.RecordWriter(self.file)
        self._write(event_pb2.Event(wall_time=time.time(), file_version='brain.Event:2'))

    def add(self, step: int, values: list[Any]) -> None:
        summary = summary_pb2.Summary(value=values)
        self._write(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self.file.flush()

    def close(self) -> None:
        self.file.close()
