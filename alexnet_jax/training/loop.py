"""The training loop."""

import contextlib
import dataclasses
import itertools
import logging
import math
import os
import shlex
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from clu import parameter_overview
from jax.experimental import multihost_utils

from alexnet_jax.common import configfile, paths
from alexnet_jax.common.errors import Stopped, UserError, printable
from alexnet_jax.devices import distributed, preemption
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.input import prepare
from alexnet_jax.nets.build import build
from alexnet_jax.rundir import checkpoint, directory
from alexnet_jax.rundir.metrics import Writer
from alexnet_jax.training import checks, diagnosis, metrics, progress
from alexnet_jax.training.setup import Setup
from alexnet_jax.training.steps import TrainState

log = logging.getLogger(__name__)
ROWS = 30  # of the table of parameters, at most: longer tables are not logged
NOT_FINITE = 'is not finite'  # part of every message about a run that diverged


@meshes.settings()
def train(config, workdir: str | os.PathLike, build: Callable = build) -> None:
    """Trains until the schedule ends, from the last checkpoint in `workdir` if there is one.

    config: the ConfigDict of `configs/base.py`. build: makes the network from the fields of
    `config.model`, for networks defined elsewhere. Raises UserError, before anything is written, if the
    config, the data or the work directory cannot be used; Stopped if asked to stop.
    """
    workdir = paths.path(workdir)
    distributed.agree({**configfile.fields(config), '--workdir': str(workdir)})
    if jax.process_count() > 1:
        distributed.check_shared(workdir)
    if distributed.is_first() and workdir.is_dir():
        with directory.locked(workdir):  # only checks that it is free, before anything slow
            pass
    mesh, net = checks.check(config, workdir, build)
    resuming = (workdir / 'config.json').exists()
    store = prepare.ensure(**config.data, alone=jax.process_count() == 1, resuming=resuming)
    distributed.agree({f'the store {config.data.store}': store.identity()})
    directory.check_store(workdir, store)
    setup = Setup.make(config, mesh, store, net.clone(classes=store.classes))
    checkpoints = checkpoint.Checkpoints(workdir / 'checkpoints', keep=config.run.keep)
    there = checkpoints.steps()
    state, history, running = setup.start(checkpoints, config.train.init_from)
    step = int(state.step)
    distributed.agree({'the step of the checkpoint': step})
    evaluated = step in history
    changed, history = checks.schedule(setup, workdir, step, history)
    # Before one process writes the new config, all must have read the old one.
    distributed.agree({'the fields that differ from the run there': changed})
    if setup.over(step, history) and step in history and not changed:
        log.info('%s: nothing left to do, the run ended at step %s', workdir, f'{step:,}')
        return

    _describe(setup, state, resuming=bool(there))
    for text in changed:
        log.info('continuing with a different schedule: %s', text)
    if changed and setup.config.run.dispatch > 1:
        log.warning(
            'config.run.dispatch=%s: a run that had this schedule from the start could have grouped its '
            'steps differently, which can change the last bit',
            setup.config.run.dispatch,
        )
    with (
        directory.locked(workdir) if distributed.is_first() else contextlib.nullcontext(),
        preemption.watch(config.run.stop_after, step) as stop,
    ):
        if distributed.is_first() and checkpoints.steps() != there:
            raise UserError(
                f'{workdir}: another process has just saved a checkpoint here; run the command again'
            )
        if evaluated and step not in history:
            checkpoints.amend(step, {'history': history, 'running': running})
        writer = Writer(
            workdir, start=step, evaluated=step in history, active=distributed.is_first()
        )
        try:
            if distributed.is_first():
                directory.write(config, workdir, store)
            if config.train.init_from and not checkpoints.steps():  # the other run may change
                checkpoints.save(step, state, {'history': history, 'running': running})
            loop = Loop(setup, workdir, checkpoints, writer, state, history, running)
            loop.run(stop)
        except jax.errors.JaxRuntimeError as error:
            distributed.leave(error)  # the last save would wait for the lost process
            raise
        except Exception:
            with contextlib.suppress(checkpoint.SaveError):  # the first error is the one to report
                checkpoints.close()
            raise
        else:
            checkpoints.close()
        finally:
            writer.close()


def _describe(setup: Setup, state: TrainState, *, resuming: bool) -> None:
    """Logs the data, the mesh, and the parameters or the step to resume from."""
    if not resuming:
        rows = parameter_overview.get_parameter_overview(state.params, include_stats=False)
        if rows.count('\n') > ROWS:
            arrays = jax.tree.leaves(state.params)
            rows = f'parameters: {sum(x.size for x in arrays):,} in {len(arrays)} arrays'
        log.info(rows)
    batch = setup.config.train.batch
    for line in progress.data_lines(setup.store, batch=batch, total=setup.total):
        log.info(line)
    if warning := progress.data_warning(setup.store, batch=batch):
        log.warning('%s', warning)
    tuned = bool(setup.config.train.init_from)
    if warning := progress.rate_warning(setup.config.optim, batch=batch, tuned=tuned):
        log.warning('%s', warning)
    log.info(meshes.describe(setup.mesh))
    group = setup.config.run.dispatch
    if group > 1 and not any(setup.dispatched(at) > 1 for at in range(0, setup.total, group)):
        log.warning(
            'config.run.dispatch=%s: no group of this many steps fits between two evaluations; each '
            'step is dispatched on its own',
            group,
        )
    if resuming:
        log.info('resuming at step %s', f'{int(state.step):,}')


class Dispatch(NamedTuple):
    """One or more steps handed to the device; their sums may still be on it."""

    step: int  # the first one
    rates: list[dict[str, float]]  # of each step
    scalars: dict[str, np.ndarray]  # the same, in the form that the train step takes
    batch: dict[str, jax.Array]
    sums: dict[str, jax.Array]

    def of(self, i: int, tree):
        """Returns the i-th step's part of the dispatch's arrays; several steps are their first axis."""
        return jax.tree.map(lambda x: x[i], tree) if len(self.rates) > 1 else tree


@dataclasses.dataclass
class Loop:
    """The training loop, with the state it carries from step to step."""

    setup: Setup
    workdir: paths.Path
    checkpoints: checkpoint.Checkpoints
    writer: Writer
    state: TrainState
    history: dict[int, float]  # {step: center-crop top-1 error, %}
    running: dict[str, float]  # sums since the last row of metrics.jsonl

    def __post_init__(self):
        self.settings = self.setup.config.run
        self.step = self.first = int(self.state.step)
        self.pending: Dispatch | None = None  # the previous one; its sums are read a dispatch late
        self.images = 0.0  # since the last row, in this start only; `running` may be older
        self.stuck = diagnosis.Stuck(self.settings.stuck_after, self.setup.store.classes)
        self.local_batches = self.setup.batches(self.step)  # may import TensorFlow for seconds
        self.clock = progress.Clock()
        self.compiled = {}  # seconds, by the size of the dispatch
        self.tracing = False
        self.recomputed = False

    def run(self, stop: Callable[[int], str]) -> None:
        """Evaluates, saves, ends or takes a step, in this order, so that a resumed run does the same.

        stop(step): the reason to stop before this step, or ''.
        """
        with self.clock.once():  # the input starts
            batch = self.fetch(self.step)
            self.warn_if_saturated(batch)
        while True:
            over = self.over()
            evaluated = self.step not in self.history and (
                over or self.setup.evaluation_due(self.step)
            )
            if evaluated:
                if over and self.setup.config.train.recompute:
                    self.recompute(stop)
                self.evaluate()
                over = over or self.over()  # the plateau rule may end the run now
            asked = stop(self.step)
            if self.save_due(evaluated, ending=over or asked):
                if asked:
                    log.info('step %s: stopping (%s), saving a checkpoint', f'{self.step:,}', asked)
                self.save(last=over or asked)
            elif evaluated:  # the checkpoint that this start began with
                self.amend()
            if over or asked:
                break
            sent = self.dispatch(batch)
            following = self.step + len(sent.rates)
            batch = self.fetch(following)  # moves to the device while it computes
            self.report()  # the previous dispatch, so that the device never waits for the host
            self.pending, self.step = sent, following
            if sent.step == self.first:
                self.report()  # immediately, for the log
            self.trace(self.step >= self.settings.profile[1])
        self.trace(end=True)
        if not over:
            raise self.stopped(asked)
        log.info(
            '%s: ended at step %s; to evaluate: python -m alexnet_jax.evaluate %s',
            printable(str(self.workdir)),
            f'{self.step:,}',
            printable(shlex.quote(str(self.workdir))),
        )

    def stopped(self, asked: str) -> Stopped:
        """Returns the exception that ends the command early; asked: the reason."""
        saved = ', saved' if self.step > self.first else ''
        return Stopped(
            f'{self.workdir}: stopped at step {self.step:,} ({asked}){saved}; run the same '
            'command to resume'
        )

    def over(self) -> bool:
        """Returns whether the schedule ends here."""
        return self.setup.over(self.step, self.history)

    def meta(self) -> dict:
        """Returns what a checkpoint stores besides the state."""
        return {'history': self.history, 'running': self.running}

    def fetch(self, step: int) -> Any:
        """Returns the batch or batches of a step's dispatch, on the devices; [] after the last."""
        with self.clock.waiting():
            local = [*itertools.islice(self.local_batches, self.setup.dispatched(step))]
            batch = self.setup.config.train.batch
            return local and meshes.global_batches(self.setup.mesh, batch, local)

    def warn_if_saturated(self, batch) -> None:
        """Warns on the first start if most units begin at the bound of their outputs."""
        if self.step == 0 and self.setup.saturated and batch:
            if self.setup.dispatched(0) > 1:
                batch = jax.tree.map(lambda x: x[0], batch)
            shares = self.setup.saturated(self.state.variables, batch, self.setup.rates(0, {}))
            if warning := diagnosis.saturation(jax.device_get(shares)):
                log.warning('%s', warning)

    def evaluate(self) -> None:
        """Adds this step's validation error to the history and to metrics.jsonl."""
        self.report()
        with self.clock.paused():
            values = self.setup.evaluate(self.state)
            modes = self.setup.compare_modes(self.state, self.history)
            self.history[self.step] = values['top1_error']
            self.writer.write('eval', self.step, values | modes)
            kernels = self.setup.net.first_kernels(self.state.params)
            if kernels is not None:
                kernels = multihost_utils.process_allgather(kernels, tiled=True)
                self.writer.image('first_kernels', self.step, progress.kernel_picture(kernels))
        log.info(
            'step %s: validation %s',
            f'{self.step:,}',
            metrics.line(values, self.setup.store.classes),
        )
        if modes:
            words = 'the latest batch: loss %.4f with its own statistics, %.4f with the running statistics'
            log.info(words, *modes.values())

    def recompute(self, stop: Callable[[int], str]) -> None:
        """Replaces the running statistics with those of more training images, at the end.

        Saves the state first. A start that resumes there recomputes them from scratch.
        """
        if self.save_due(evaluated=True, ending=True):
            self.save(last=True)
        shown = -1

        def watch(done: int, of: int) -> None:
            nonlocal shown
            if asked := stop(self.first):  # a stop_after in steps does not interrupt it
                raise self.stopped(asked)
            if (tenth := 10 * done // of) > shown:
                shown = tenth
                words = 'step %s: recomputing the statistics, %s of %s images'
                log.info(words, f'{self.step:,}', f'{done:,}', f'{of:,}')

        self.state = self.setup.recompute(self.state, watch)
        self.recomputed = True

    def save_due(self, evaluated: bool, ending: bool) -> bool:
        if self.recomputed:
            return True
        if self.step == self.first:  # keep the checkpoint that this start began with
            return evaluated and not self.checkpoints.steps()
        return evaluated or bool(ending) or self.step % self.settings.checkpoint_every == 0

    def save(self, last: bool) -> None:
        """Saves the state, after checking that everything that led to it is finite."""
        self.report()
        state = self.state
        if not self.setup.all_finite((state.variables, state.opt_state, state.ema)):
            broken = self.setup.find_broken(state.variables)
            self.diverged(f'step {self.step:,} {NOT_FINITE}: {broken}')
        self.writer.sync()
        with self.clock.once():
            try:
                self.checkpoints.wait()
            except checkpoint.SaveError as error:
                self.tolerate(error)
            try:
                self.checkpoints.save(self.step, state, self.meta())
                if last or self.settings.saves == 'wait':
                    self.checkpoints.wait()
            except checkpoint.SaveError as error:
                if last:
                    raise
                self.tolerate(error)

    def amend(self) -> None:
        """Adds an evaluation to the checkpoint that this start began with."""
        self.writer.sync()
        try:
            self.checkpoints.amend(self.step, self.meta())
        except checkpoint.SaveError as error:
            self.tolerate(error)

    def tolerate(self, error: checkpoint.SaveError) -> None:
        if self.settings.failed_save == 'stop':
            raise error
        log.warning('%s; training continues without this checkpoint', error)

    def diverged(self, what: str) -> None:
        """Raises a UserError that says what is not finite, and which checkpoint is the latest."""
        with contextlib.suppress(checkpoint.SaveError):
            self.checkpoints.wait()
        raise UserError(
            f'{self.workdir}: {what}; the latest checkpoint, which is finite but may already be diverging, '
            f'is from step {max(self.checkpoints.steps(), default=0):,}; {diagnosis.CAUSES}'
        )

    def dispatch(self, batch) -> Dispatch:
        """Hands the next step or steps to the device; `state` becomes the one after them."""
        count = self.setup.dispatched(self.step)
        new = count not in self.compiled
        if new:  # compile time must not count for the steps before
            self.report()
        start, stop = self.settings.profile
        if not self.tracing and start < self.step + count and self.step < stop:
            folder = paths.plain(paths.absolute(self.workdir)) / 'profile'
            jax.profiler.start_trace(str(folder))
            self.tracing = True
        rates = [self.setup.rates(self.step + i, self.history) for i in range(count)]
        names = [name for name in rates[0] if name != 'stop']
        scalars = {name: np.float32([each[name] for each in rates]) for name in names}
        if count == 1:
            scalars = {name: value[0] for name, value in scalars.items()}
        train = self.setup.train_steps if count > 1 else self.setup.train_step
        with self.clock.once() if new else contextlib.nullcontext() as seconds:
            self.state, sums = train(self.state, batch, scalars)
        if new:
            (self.compiled[count],) = seconds
        return Dispatch(self.step, rates, scalars, batch, sums)

    def report(self) -> None:
        """Accounts for the pending dispatch, if any: its sums, rows and log lines."""
        if self.pending is None:
            return
        done, self.pending = self.pending, None
        all_sums = jax.device_get(done.sums)
        for i, rates in enumerate(done.rates):
            step = done.step + i
            sums = {name: float(value) for name, value in done.of(i, all_sums).items()}
            if not math.isfinite(sums['loss']):  # `state` may already be past the next dispatch
                again = done.of(i, (done.batch, done.scalars))
                broken = self.setup.find_broken(self.state.variables, step, *again)
                self.diverged(f'the loss of step {step:,} {NOT_FINITE}: {broken}')
            if {*self.running} != {*sums}:  # none yet, or an earlier version's, with fewer metrics
                self.running = dict.fromkeys(sums, 0.0)
            self.running = {name: self.running[name] + sums[name] for name in sums}
            self.images += sums['count']
            if step == self.first:
                line = progress.first_line(
                    step + len(done.rates),
                    self.setup.total,
                    np.sum(all_sums['loss']) / np.sum(all_sums['count']),
                    self.compiled[len(done.rates)],
                )
                log.info(line)
                self.clock.said()
            if (step + 1) % self.settings.log_every == 0:
                self.write_row(step, rates)
        total, batch = self.setup.total, self.setup.config.train.batch
        left = -(step + 1) % self.settings.log_every * batch
        if left and (steady := self.clock.overdue(self.images, left)):
            log.info(progress.short_line(step + 1, total, batch, steady))

    def write_row(self, step: int, rates: dict[str, float]) -> None:
        """Ends an interval of `log_every` steps: writes its row and its log line."""
        batch, total = self.setup.config.train.batch, self.setup.total
        times, steady = self.clock.interval(self.images)
        values = {
            'epoch': (step + 1) * batch / self.setup.store.counts['train'],
            **metrics.values(self.running),
            **{name: rate for name, rate in rates.items() if name != 'stop'},
            **times,
        }
        self.writer.write('train', step, values)
        classes = self.setup.store.classes
        log.info(progress.line(step + 1, total, batch, classes, values, steady))
        if self.stuck(values['loss'], self.settings.log_every):
            log.warning('step %s: %s', f'{step + 1:,}', self.stuck.advice)
        self.running, self.images = {}, 0.0

    def trace(self, end: bool) -> None:
        """Ends the running profiler trace, if any, when `end` is true."""
        if self.tracing and end:
            self.report()
            jax.profiler.stop_trace()
            self.tracing = False
            log.info('wrote %s', printable(str(self.workdir / 'profile')))
