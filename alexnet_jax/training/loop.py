"""The training loop."""

import contextlib
import itertools
import logging
import math
import os

import jax
import numpy as np
from clu import parameter_overview
from jax.experimental import multihost_utils

from alexnet_jax.common import configfile, paths
from alexnet_jax.common.errors import Stopped, UserError
from alexnet_jax.devices import distributed, preemption
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.input import prepare
from alexnet_jax.rundir import checkpoint, directory, metrics
from alexnet_jax.training import checks, diagnosis, progress
from alexnet_jax.training.setup import Job

log = logging.getLogger(__name__)
NOT_FINITE = 'is not finite'  # what every message about a training that diverged says


def train(config, workdir: str | os.PathLike) -> None:
    """Trains, from the last checkpoint in `workdir` if there is one, until the schedule ends.

    config: the ConfigDict of `configs/base.py`. Raises UserError, before anything is written, for
    what the config, the data or the work directory do not allow; Stopped if it was asked to stop.
    """
    workdir = paths.path(workdir)
    distributed.agree({**configfile.fields(config), '--workdir': str(workdir)})
    if jax.process_count() > 1:
        distributed.check_shared(workdir)
    mesh = checks.check(config, workdir)
    store = prepare.ensure(**config.data, alone=jax.process_count() == 1)
    distributed.agree({f'the store {config.data.store}': store.identity()})
    directory.check_store(workdir, store)
    job = Job.make(config, mesh, store)
    checkpoints = checkpoint.Checkpoints(workdir / 'checkpoints', keep=config.run.keep)
    there = checkpoints.steps()
    state, history, running = job.start(checkpoints, config.train.init_from)
    step = int(state.step)
    distributed.agree({'the step of the checkpoint': step})
    if step == job.total or job.rates(step, history)['stop']:
        log.info('%s: nothing left to do, the run ended at step %s', workdir, f'{step:,}')
        return

    log.info(parameter_overview.get_parameter_overview(state.params, include_stats=False))
    log.info(meshes.describe(mesh))
    group = config.run.dispatch
    if group > 1 and not any(job.dispatched(at) > 1 for at in range(0, job.total, group)):
        log.warning(
            'config.run.dispatch=%s: so many steps do not fit between two evaluations, so each is made '
            'alone',
            group,
        )
    if checkpoints.steps():
        log.info('resuming at step %s', f'{step:,}')
    main_process = jax.process_index() == 0
    with (
        directory.locked(workdir) if main_process else contextlib.nullcontext(),
        preemption.watch(config.run.stop_after, step) as stop,
    ):
        if main_process and checkpoints.steps() != there:
            raise UserError(f'{workdir}: another start saved a checkpoint just now; start again')
        writer = metrics.Writer(workdir, start=step, active=main_process)
        try:
            if main_process:
                directory.write(config, workdir, store)
            if config.train.init_from and not checkpoints.steps():  # the other run may change
                checkpoints.save(step, state, {'history': history, 'running': running})
            _loop(job, state, history, running, checkpoints, writer, workdir, stop)
        except jax.errors.JaxRuntimeError as error:
            distributed.leave(error)  # the last save would wait for the process that is lost
            raise
        except Exception:
            with contextlib.suppress(checkpoint.SaveError):  # what went wrong first is the news
                checkpoints.close()
            raise
        else:
            checkpoints.close()
        finally:
            writer.close()


def _loop(job: Job, state, history, running, checkpoints, writer, workdir, stop) -> None:
    run = job.config.run
    step = first = int(state.step)
    batches = job.batches(step)
    pending = None  # the dispatch before, its sums still on the device: it never waits for us
    clock, images = progress.Clock(), 0
    stuck = diagnosis.Stuck(run.stuck_after, job.store.classes)
    tracing = False
    compiled = set()  # how many steps the dispatches make that were made before

    def fetch(at):
        """What the dispatch at a step is given: a batch, or several as one; none after the last."""
        with clock.waiting():
            local = [*itertools.islice(batches, job.dispatched(at))]
            return local and meshes.global_batches(job.mesh, job.config.train.batch, local)

    def account():
        nonlocal pending, running, images
        if pending is None:
            return
        begin, group, scalars, all_sums, batch = pending
        pending = None
        all_sums = jax.device_get(all_sums)
        for i, rates in enumerate(group):
            done = begin + i
            sums = {name: float(value) for name, value in _of(i, group, all_sums).items()}
            if not math.isfinite(sums['loss']):  # `state` may be that after the next dispatch
                broken = job.find_broken(state.params, done, *_of(i, group, (batch, scalars)))
                raise UserError(
                    f'{workdir}: the loss of step {done:,} {NOT_FINITE}: {broken}; {kept()}'
                )
            running = {name: running.get(name, 0.0) + sums[name] for name in sums}
            # of this start alone: `running` may go back to before a restart
            images += sums['count']
            if (done + 1) % run.log_every == 0:
                values = metrics.errors(running) | {
                    n: rate for n, rate in rates.items() if n != 'stop'
                }
                epoch = (done + 1) * job.config.train.batch / job.store.counts['train']
                values = {'epoch': epoch, **values, **clock.interval(images)}
                writer.write('train', done, values)
                log.info(progress.line(done + 1, job.total, job.config.train.batch, values))
                if stuck(values['loss'], run.log_every):
                    log.warning('step %s: %s', f'{done + 1:,}', stuck.advice)
                running, images = {}, 0

    def save(last):
        account()
        if not job.all_finite((state.params, state.opt_state)):
            broken = job.find_broken(state.params)
            raise UserError(f'{workdir}: step {step:,} {NOT_FINITE}: {broken}; {kept()}')
        writer.sync()
        try:
            checkpoints.wait()
        except checkpoint.SaveError as error:
            tolerate(error)
        try:
            checkpoints.save(step, state, {'history': history, 'running': running})
            if last or run.saves == 'wait':
                checkpoints.wait()
        except checkpoint.SaveError as error:
            if last:
                raise
            tolerate(error)

    def tolerate(error):
        if run.failed_save == 'stop':
            raise error
        log.warning('%s; going on without it', error)

    def kept():
        with contextlib.suppress(checkpoint.SaveError):
            checkpoints.wait()
        return (
            f'the last good checkpoint is that of step {max(checkpoints.steps(), default=0):,}; '
            f'{diagnosis.CAUSES}'
        )

    batch = fetch(step)
    while True:
        rates = job.rates(step, history)
        over = step == job.total or rates['stop']
        due = (over or job.evaluation_due(step)) and step not in history
        if due:
            account()
            with clock.paused():
                errors = job.evaluate(state)
            history[step] = errors['top1_error']
            writer.write('eval', step, errors)
            if 'conv1' in state.params:
                kernels = state.params['conv1']['kernel']
                conv1 = multihost_utils.process_allgather(kernels, tiled=True)
                writer.image('conv1', step, progress.kernel_picture(conv1))
            log.info(
                'step %s: validation loss %.4f, top-1 error %.2f %%, top-5 error %.2f %%',
                f'{step:,}',
                errors['loss'],
                errors['top1_error'],
                errors['top5_error'],
            )
            rates = job.rates(step, history)
        over = over or rates['stop']
        asked = stop(step)
        if step == first:  # the checkpoint that this start began with stays
            saves = due and not checkpoints.steps()
        else:
            saves = due or over or asked or step % run.checkpoint_every == 0
        if saves:
            save(last=over or asked)
        if over or asked:
            break
        count = job.dispatched(step)
        if count not in compiled:  # which takes time, but not that of the steps before
            account()
            compiled.add(count)
        if not tracing and run.profile[0] < step + count and step < run.profile[1]:
            jax.profiler.start_trace(workdir / 'profile')
            tracing = True
        group = [job.rates(step + i, history) for i in range(count)]
        names = [name for name in rates if name != 'stop']
        scalars = {name: np.float32([one[name] for one in group]) for name in names}
        if count > 1:
            state, sums = job.train_steps(state, batch, scalars)
        else:
            scalars = {name: value[0] for name, value in scalars.items()}
            state, sums = job.train_step(state, batch, scalars)
        # it travels to the device while this and the one before run
        following = fetch(step + count)
        account()
        pending = step, group, scalars, sums, batch
        step, batch = step + count, following
        if tracing and step >= run.profile[1]:
            account()
            jax.profiler.stop_trace()
            tracing = False
    if tracing:
        jax.profiler.stop_trace()
    if not over:
        saved = ', saved' if step > first else ''
        raise Stopped(
            f'{workdir}: stopped at step {step:,} ({asked}){saved}; the same command goes on'
        )
    log.info(
        '%s: ended at step %s; to evaluate: python -m alexnet_jax.evaluate %s',
        workdir,
        f'{step:,}',
        workdir,
    )


def _of(i: int, group: list, tree):
    """What arrays of a dispatch hold of its step i: where there are several, that is the first axis."""
    return jax.tree.map(lambda x: x[i], tree) if len(group) > 1 else tree
