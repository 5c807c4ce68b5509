"""The training loop."""

import contextlib
import dataclasses
import logging
import math
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from clu import parameter_overview
from jax.experimental import multihost_utils

from alexnet_jax import (
    checkpoint,
    checks,
    data,
    evaluate,
    metrics,
    model,
    optim,
    prepare,
    progress,
    rundir,
    steps,
    switches,
)
from alexnet_jax import mesh as meshes
from alexnet_jax.errors import UserError
from alexnet_jax.store import Store

log = logging.getLogger(__name__)


def train(config, workdir: str | pathlib.Path) -> None:
    """Trains, from the last checkpoint in `workdir` if there is one, until the schedule ends.

    config: the ConfigDict of `configs/base.py`. Raises UserError, before anything is written, for
    what the config, the data or the work directory do not allow.
    """
    workdir = pathlib.Path(workdir)
    mesh = checks.check(config, workdir)
    store = prepare.ensure(**config.data)
    rundir.check_store(workdir, store)
    job = Job.make(config, mesh, store)
    checkpoints = checkpoint.Checkpoints(workdir / 'checkpoints')
    state, history, running = job.start(checkpoints, config.train.init_from)
    step = int(state.step)
    if step == job.total or job.rates(step, history)['stop']:
        log.info('%s: nothing left to do, the run ended at step %s', workdir, f'{step:,}')
        return

    log.info(parameter_overview.get_parameter_overview(state.params, include_stats=False))
    log.info(meshes.describe(mesh))
    if checkpoints.steps():
        log.info('resuming at step %s', f'{step:,}')
    main_process = jax.process_index() == 0
    with rundir.locked(workdir) if main_process else contextlib.nullcontext():
        writer = metrics.Writer(workdir, start=step, active=main_process)
        try:
            if main_process:
                rundir.write(config, workdir, store)
            if config.train.init_from and not checkpoints.steps():  # the other run may change
                checkpoints.save(step, state, {'history': history, 'running': running})
            _loop(job, state, history, running, checkpoints, writer, workdir)
        finally:
            writer.close()
            checkpoints.close()


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that the config fixes before the first step."""

    config: object
    mesh: jax.sharding.Mesh
    store: Store
    net: model.AlexNet
    optimizer: object
    rates: Callable
    total: int  # steps, at the most
    train_step: Callable
    predict: Callable
    all_finite: Callable

    @classmethod
    def make(cls, config, mesh, store: Store) -> 'Job':
        net = switches.build(classes=store.classes, **config.model)
        optimizer = optim.sgd(
            momentum=config.optim.momentum, decay=config.optim.decay, freeze=config.train.freeze
        )
        examples, crop = store.counts['train'], config.augment.crop
        return cls(
            config=config,
            mesh=mesh,
            store=store,
            net=net,
            optimizer=optimizer,
            rates=optim.make_rates(examples=examples, batch=config.train.batch, **config.optim),
            total=optim.steps_per(config.optim.epochs, examples, config.train.batch),
            train_step=steps.make_train_step(
                net,
                optimizer,
                mesh,
                seed=config.seed,
                mean=steps.window_mean(store.mean, crop),
                eigenvectors=store.eigenvectors,
                sigma=store.sigma,
                **config.colour,
            ),
            predict=steps.make_predict(net, mesh, mean=store.mean, views='centre', crop=crop),
            all_finite=steps.make_all_finite(mesh),
        )

    def start(self, checkpoints, init_from: str):
        """(state, history, running sums) at the last checkpoint, or at the beginning."""
        crop = self.config.augment.crop
        target = steps.abstract_state(self.net, self.optimizer, self.mesh, crop)
        if checkpoints.steps():
            _, state, meta = checkpoints.restore(target)
            history = {int(step): error for step, error in meta['history'].items()}
            return state, history, meta['running']
        state = steps.init_state(
            self.net, self.optimizer, self.mesh, seed=self.config.seed, crop=crop
        )
        if init_from:
            state = state.replace(params=_params_from(init_from, target.params, state.params))
        return state, {}, {}

    def batches(self, start: int):
        """This process's rows of the batches from a step on."""
        return data.train_batches(
            self.store,
            seed=self.config.seed,
            batch=self.config.train.batch,
            start=start,
            stop=self.total,
            rows=meshes.rows(self.mesh, self.config.train.batch),
            threads=self.config.run.threads,
            **self.config.augment,
        )

    def evaluate(self, state: steps.TrainState) -> dict[str, float]:
        """Errors on the validation split, centre crop."""
        sums = evaluate.evaluate(
            [lambda images: self.predict(state.params, images)],
            self.mesh,
            self.store,
            split='val',
            batch=self.config.run.eval_batch,
            threads=self.config.run.threads,
        )
        return metrics.errors(sums)

    def evaluation_due(self, step: int) -> bool:
        examples, batch = self.store.counts['train'], self.config.train.batch
        every = self.config.run.eval_every
        number = math.floor(step * batch / (every * examples) + 1e-9)
        return number > 0 and step == optim.steps_per(number * every, examples, batch)


def _params_from(run_dir: str, target: dict, fresh: dict) -> dict:
    """Another run's parameters; the last layer stays fresh where the class count differs."""
    rundir.read_config(run_dir)
    other = checkpoint.Checkpoints(pathlib.Path(run_dir) / 'checkpoints')
    there = other.shapes()
    bias = there.get('params/fc8/bias')
    same = bias is not None and bias.shape == target['fc8']['bias'].shape
    wanted = {layer: leaves for layer, leaves in target.items() if same or layer != 'fc8'}
    step, params, _ = other.restore_params(wanted)
    log.info('starting from %s, step %s%s', run_dir, step, '' if same else ', with a new last layer')
    return {**fresh, **params}


def _loop(job: Job, state, history, running, checkpoints, writer, workdir) -> None:
    run = job.config.run
    step = first = int(state.step)
    batches = job.batches(step)
    pending = None  # the sums of the step before, still on the device: it never waits for us
    clock, images = progress.Clock(), 0
    tracing = False
    stop_at = step + run.stop_after if run.stop_after else None

    def account():
        nonlocal pending, running, images
        if pending is None:
            return
        done, rates, sums = pending
        pending = None
        sums = {name: float(value) for name, value in jax.device_get(sums).items()}
        if not math.isfinite(sums['loss']):
            raise UserError(
                f'{workdir}: the loss of step {done:,} is not finite; the last good checkpoint is '
                f'step {max(checkpoints.steps(), default=0):,}; a lower config.optim.rate may help'
            )
        running = {name: running.get(name, 0.0) + sums[name] for name in sums}
        images += sums['count']  # of this start alone: `running` may go back to before a restart
        if (done + 1) % run.log_every == 0:
            values = metrics.errors(running) | {k: v for k, v in rates.items() if k != 'stop'}
            epoch = (done + 1) * job.config.train.batch / job.store.counts['train']
            values = {'epoch': epoch, **values, **clock.interval(images)}
            writer.write('train', done, values)
            log.info(progress.line(done + 1, job.total, job.config.train.batch, values))
            running, images = {}, 0

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
                f'{step:,}', errors['loss'], errors['top1_error'], errors['top5_error'],
            )
            rates = job.rates(step, history)
        last = over or rates['stop'] or step == stop_at
        if due or (step > first and (last or step % run.checkpoint_every == 0)):
            account()
            if not job.all_finite((state.params, state.opt_state)):
                raise UserError(f'{workdir}: step {step:,} has parameters that are not finite')
            checkpoints.save(step, state, {'history': history, 'running': running})
        if last:
            break
        if not tracing and run.profile[0] <= step < run.profile[1]:
            jax.profiler.start_trace(workdir / 'profile')
            tracing = True
        with clock.waiting():
            batch = meshes.global_batch(job.mesh, job.config.train.batch, next(batches))
        scalars = {name: np.float32(value) for name, value in rates.items() if name != 'stop'}
        state, sums = job.train_step(state, batch, scalars)
        account()
        pending = step, rates, sums
        step += 1
        if tracing and step >= run.profile[1]:
            account()
            jax.profiler.stop_trace()
            tracing = False
    if tracing:
        jax.profiler.stop_trace()
    log.info('stopped at step %s; to evaluate: python -m alexnet_jax.evaluate %s', f'{step:,}', workdir)
