"""Checkpoints: asynchronous saves through orbax, and restores that verify every bit.

A checkpoint is a folder named after its step, `<directory>/<step>/`, with the arrays of the state in
`state/` (orbax's format, independent of the mesh) and one JSON object in `meta/metadata`:

    meta     from the caller: the history of errors and anything else the run must remember
    leaves   shape, dtype and fingerprint of every leaf of the state, by name ('params/conv1/kernel')
    crc32    of the two above, so that a changed digit in the history is detected

A folder gets its final name only once it is complete. In a bucket (`common/paths.py`), where nothing can
be renamed, it counts only if it has the object commit_success.txt, which is written last. The CRC, orbax
or the fingerprints detect later damage; a damaged checkpoint is never used.
"""

import contextlib
import functools
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from alexnet_jax.common import paths
from alexnet_jax.common.errors import UserError, one_line
from alexnet_jax.rundir import fingerprint

log = logging.getLogger(__name__)


class SaveError(UserError):
    """A checkpoint could not be written, for example to a full disk; earlier ones are intact."""


class Checkpoints:
    """The checkpoints of one run in `directory`: the latest `keep` and the one with the lowest error.

    The error of a step is `meta['history'][str(step)]` as saved with that step; a step saved without
    that entry is never the best. Nothing is written, and no folder created, before the first `save`.
    In a multi-process run, all processes must call every method.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 2):
        if keep < 1:
            raise UserError(f'{directory}: cannot keep {keep} checkpoints; keep at least 1')
        self.directory = paths.absolute(paths.path(directory))  # orbax rejects relative paths
        paths.plain(self.directory)  # a UserError now, not at the first save
        self._policy = _LatestAndBest(keep)
        self._manager: _Manager | None = None
        logging.getLogger('absl').addFilter(_without_chatter)

    def steps(self) -> list[int]:
        """The steps that have a finished checkpoint, damaged or not, in ascending order."""
        if not self.directory.is_dir():
            return []
        return sorted(ocp.utils.checkpoint_steps(self.directory))

    def best_step(self) -> int | None:
        """The step with the lowest error; None if no step was evaluated."""
        return _best({step: self._error(step) for step in self.steps()})

    def leaves(self) -> dict[str, dict]:
        """The shape, dtype and fingerprint of every leaf of the latest readable step, by name."""
        _, record = self._first_good(None, self._agreed_record)
        return record['leaves']

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shape and dtype of every leaf of the latest readable step, by name."""
        return {
            name: jax.ShapeDtypeStruct(leaf['shape'], leaf['dtype'])
            for name, leaf in self.leaves().items()
        }

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Starts saving `state`, a pytree of jax.Arrays, and `meta`, a JSON object without NaN.

        Both are copied before this returns, so the arrays can be donated and `meta` changed right
        away. Existing checkpoints of this or later steps are removed: they are from steps that are
        being repeated (after a fallback to an earlier step, or a restore of one), and a damaged
        one must never displace a good one among the latest. Raises SaveError if this save or the
        previous one cannot be written.
        """
        record = _make_record(meta, fingerprint.describe(state))
        self.wait()
        try:
            orbax = self._open()
            for later in [s for s in orbax.all_steps() if s >= step]:
                orbax.delete(later)
                self._policy.errors.pop(later, None)
            self._policy.errors[step] = _own_error(step, record)
            orbax.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(fingerprint.named_leaves(state)),
                    meta=ocp.args.JsonSave(record),
                ),
                force=True,  # the caller decides when to save, not orbax's own rules
            )
        except paths.failures(self.directory) as error:
            _raise_if_lost(error)
            raise self._failed(f'cannot save step {step}', error) from error

    def amend(self, step: int, meta: dict) -> None:
        """Replaces the meta of a checkpoint in one atomic step; SaveError if it cannot be written."""
        self.wait()
        record = _make_record(meta, self._agreed_record(step)['leaves'])
        self._policy.errors[step] = _own_error(step, record)
        if jax.process_index() > 0:
            return
        file = self._at(step) / 'meta' / 'metadata'
        try:
            paths.replace(file, json.dumps(record).encode())
        except paths.failures(file) as error:
            raise SaveError(
                f'{file}: cannot be written: {paths.full(error)}{one_line(error)}'
            ) from error

    def restore(self, target: Any, step: int | None = None) -> tuple[int, Any, dict]:
        """Restores a whole state with the structure of `target` -> (step, state, meta).

        The leaves of `target` are jax.ShapeDtypeStructs with the desired shardings, on any mesh.
        Without `step`, restores the latest good checkpoint: damaged ones are skipped, with a warning
        that names the step and the leaf or file, and left in place. Raises UserError if there is no
        checkpoint, if none (or not the requested one) is intact, or if names, shapes or dtypes
        differ from those of `target`, which means another model.
        """
        return self._restore(target, step, whole=True)

    def restore_part(self, target: dict, step: int | None = None) -> tuple[int, Any, dict]:
        """Restores some leaves of a saved state, by name -> (step, leaves, meta).

        Like `restore`, but `target` is nested ({'params': {'conv1': ...}}) or flat
        ({'params/conv1/kernel': ...}), and leaves that it omits are not read.
        """
        return self._restore(target, step, whole=False)

    def wait(self) -> None:
        """Waits until the current save is on disk; SaveError if it could not be written."""
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # a full disk raises one of several types
            _raise_if_lost(error)
            raise self._failed('saving failed', error) from error

    def _failed(self, what: str, error: Exception) -> SaveError:
        self._manager, failed = None, self._manager
        # One of several processes exits now: a manager would wait for all of them.
        if jax.process_count() == 1:
            with contextlib.suppress(Exception):  # it reports the same failure again
                failed.close()
            with contextlib.suppress(Exception):  # a new one removes half-written files
                self._open()
        intact = f'intact checkpoints: {self.steps()}'
        return SaveError(
            f'{self.directory}: {what}: {paths.full(error)}{one_line(error)}; {intact}'
        )

    def close(self) -> None:
        """Waits for the current save and ends orbax's threads."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _open(self) -> '_Manager':
        # Not before the first save: see _Manager.
        if self._manager is None:
            if getattr(sys.unraisablehook, 'func', None) is not _without_leftovers:
                sys.unraisablehook = functools.partial(_without_leftovers, sys.unraisablehook)
            self._policy.errors = {step: self._error(step) for step in self.steps()}
            if not paths.is_remote(self.directory):  # the folder that `plain` links to must exist
                self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = _Manager(paths.plain(self.directory), self._policy)
        return self._manager

    def _restore(self, target: Any, step: int | None, *, whole: bool) -> tuple[int, Any, dict]:
        def load(step: int) -> tuple[Any, dict]:
            record = self._agreed_record(step)
            leaves = record['leaves']
            fingerprint.check_same_model(self._at(step), leaves, target, whole=whole)
            return self._load(step, record, target), record['meta']

        step, (state, meta) = self._first_good(step, load)
        return step, state, meta

    def _first_good(self, step: int | None, load: Callable[[int], Any]) -> tuple[int, Any]:
        """(step, load(step)) for `step`, or for the latest one that `load` finds undamaged."""
        self.wait()
        steps = self.steps()
        if not steps:
            raise UserError(f'{self.directory}: there is no checkpoint here')
        if step is not None:
            if step not in steps:
                raise UserError(
                    f'{self.directory}: no checkpoint of step {step}; available: {steps}'
                )
            try:
                return step, load(step)
            except _Damaged as damage:
                raise UserError(
                    f'{self.directory}/{step} is damaged: {damage}; available: {steps}'
                ) from damage
        for candidate in reversed(steps):
            try:
                return candidate, load(candidate)
            except _Damaged as damage:
                log.warning('%s/%d is damaged, skipping it: %s', self.directory, candidate, damage)
                last = damage
        raise UserError(
            f'{self.directory}: every checkpoint here is damaged ({steps}); '
            f'remove the folder to start over; {steps[0]}: {last}'
        ) from last

    def _record(self, step: int) -> dict:
        """The JSON object of a step; _Damaged if it has changed since it was written."""
        path = self._at(step) / 'meta' / 'metadata'
        try:
            record = json.loads(path.read_bytes())
            content = {'meta': record['meta'], 'leaves': record['leaves']}
            intact = record['crc32'] == fingerprint.crc32(content)
        except (paths.failures(path), ValueError, KeyError, TypeError) as error:
            raise _Damaged(f'meta/metadata cannot be read ({one_line(error)})') from error
        if not intact:
            raise _Damaged('meta/metadata has changed since it was written (CRC)')
        return record

    def _agreed_record(self, step: int) -> dict:
        """Like `_record`, but raises _Damaged in all processes if it does in one."""
        record, damage = None, None
        try:
            record = self._record(step)
        except _Damaged as error:
            damage = error
        if not _all_processes(damage is None):
            raise damage or _Damaged('meta/metadata cannot be read in another process')
        return record

    def _error(self, step: int) -> float | None:
        try:
            return _own_error(step, self._record(step))
        except _Damaged:
            return None  # restore() is where damage is reported

    def _at(self, step: int) -> paths.Path:
        return self.directory / str(step)

    def _load(self, step: int, record: dict, target: Any) -> Any:
        state = []
        for name, leaf in fingerprint.named_leaves(target).items():
            value, problem = None, None
            try:
                value = self._read(step, name, leaf)
            except MemoryError:
                raise
            except Exception as error:  # orbax, tensorstore, zstd: damaged bytes raise anything
                problem = one_line(error)
            if not _all_processes(problem is None):
                raise _Damaged(f'{name} cannot be read ({problem or "in another process"})')
            state.append(jax.make_array_from_callback(leaf.shape, leaf.sharding, value.__getitem__))
        state = jax.tree.unflatten(jax.tree.structure(target), state)
        changed = [
            name
            for name, value in fingerprint.fingerprints(state).items()
            if value != record['leaves'][name]['fingerprint']
        ]
        if changed:
            raise _Damaged(f'{", ".join(changed)} changed since it was saved (fingerprint)')
        return state

    def _read(self, step: int, name: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        """Reads one whole leaf to the host."""
        # One at a time, directly through orbax's handler. Checkpointer.restore would end in a barrier,
        # where the others would hang if only one process met damage; and if one of several
        # concurrent reads fails, the others print tracebacks.
        value = ocp.PyTreeCheckpointHandler().restore(
            paths.plain(self.directory) / str(step) / 'state',
            args=ocp.args.PyTreeRestore(
                item={name: leaf},
                restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)},
                partial_restore=True,
            ),
        )[name]
        # A leaf missing from orbax's own list comes back unchanged, as a ShapeDtypeStruct.
        if not isinstance(value, np.ndarray):
            raise ValueError('it is not among the arrays')
        if (value.shape, value.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(f'it has become {value.dtype}{list(value.shape)}')
        return value


class _Damaged(Exception):
    """A checkpoint has changed since it was saved; the message names the leaf or file."""


def _make_record(meta: dict, leaves: dict) -> dict:
    """What a checkpoint stores besides the arrays."""
    # A JSON round trip makes a copy, and the same object that a restore will return.
    content = json.loads(json.dumps({'meta': meta, 'leaves': leaves}, allow_nan=False))
    return {**content, 'crc32': fingerprint.crc32(content)}


def _own_error(step: int, record: dict) -> float | None:
    return record['meta'].get('history', {}).get(str(step))


def _all_processes(good: bool) -> bool:
    if jax.process_count() == 1:
        return good
    return bool(multihost_utils.process_allgather(jnp.array(good)).all())


def _raise_if_lost(error: Exception) -> None:
    """Raises the cause of an error if that is a lost process, rather than this disk."""
    while error is not None and jax.process_count() > 1:
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise error
        error = error.__cause__ or error.__context__  # orbax reports a timeout


class _LatestAndBest:
    """orbax's preservation policy: the latest `keep` steps and the one with the lowest error."""

    def __init__(self, keep: int):
        self.keep = keep
        self.errors: dict[int, float | None] = {}  # of the steps on disk

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-self.keep :], _best({s: self.errors.get(s) for s in steps})}
        return [step in kept for step in steps]


def _best(errors: dict[int, float | None]) -> int | None:
    evaluated = [step for step in errors if errors[step] is not None]
    return min(evaluated, key=lambda step: (errors[step], step), default=None)


class _Manager(ocp.CheckpointManager):
    """Saves in the background on every call; keeps what `policy` selects.

    Its constructor creates the folder and removes unfinished saves, so create one only to save.
    """

    def __init__(self, directory: str | os.PathLike, policy: _LatestAndBest):
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        super().__init__(directory, options=options)

    def reached_preemption(self, step: int) -> bool:
        # orbax would report the steps it saves to JAX's preemption service, but `devices/preemption.py`
        # reports a count: a lower number in between can make all processes miss where they should stop.
        return False


def _without_chatter(record: logging.LogRecord) -> bool:
    """Drops orbax's log messages, dozens of lines per save; what it logs as errors, it also raises."""
    return '/orbax/' not in record.pathname


def _without_leftovers(before: Callable, unraisable: Any) -> None:
    """The sys.unraisablehook of a process that saves; before: the one that it replaces.

    If a save fails, tensorstore calls it for each write that is still under way.
    """
    if str(unraisable.exc_value) != 'Event loop is closed':
        before(unraisable)
