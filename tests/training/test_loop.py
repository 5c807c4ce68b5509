"""The training loop: when it evaluates, saves and stops, and what it refuses to save."""

import dataclasses
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.common.errors import Stopped, UserError
from alexnet_jax.devices import backend
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.input import batches
from alexnet_jax.input.store import open_store
from alexnet_jax.nets.build import build
from alexnet_jax.rundir import checkpoint, directory, metrics
from alexnet_jax.rundir.checkpoint import Checkpoints
from alexnet_jax.training import checks, diagnosis, evaluation, loop, optim
from alexnet_jax.training.setup import Setup
from configs import quickstart
from tests.helpers.commands import assert_same, outcome
from tests.helpers.run_dirs import without_tensorflow
from tests.helpers.stores import write_store

EXAMPLES, BATCH = 20, 8


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp('store') / 'tiny'
    write_store(path, format='u8', size=72, classes=3, counts={'train': EXAMPLES, 'val': 7})
    return path


def make_config(store, **changes):
    config = quickstart.get_config()
    config.update_from_flattened_dict(
        {
            'data.source': 'made_up',
            'data.store': str(store),
            'data.size': 72,
            'augment.crop': 64,
            'train.batch': BATCH,
            'run.eval_batch': BATCH,
            'run.mesh': (1, 2),
            'run.log_every': 1,
            'optim.epochs': 4.0,
            'optim.drops': (),
            **changes,
        }
    )
    return config


def test_only_the_first_start_compares_the_data_with_its_source(store, tmp_path, monkeypatch):
    def ensure(resuming, **data):
        raise UserError(f'resuming: {resuming}')

    monkeypatch.setattr(loop.prepare, 'ensure', ensure)
    config = make_config(store)
    with pytest.raises(UserError, match='resuming: False'):
        loop.train(config, tmp_path / 'run')
    directory.write(config, tmp_path / 'run', open_store(store))
    with pytest.raises(UserError, match='resuming: True'):
        loop.train(config, tmp_path / 'run')


def test_a_locked_directory_is_refused_first(store, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.checks, 'check', None)
    with directory.locked(tmp_path / 'run'):
        with pytest.raises(UserError, match='another process is training here'):
            loop.train(make_config(store), tmp_path / 'run')


@pytest.mark.parametrize(('field', 'value'), [('run.eval_every', 1e-9), ('optim.epochs', 1e-12)])
def test_intervals_shorter_than_a_step(store, tmp_path, field, value):
    with pytest.raises(UserError, match=f'config.{field}={value}: shorter than a step'):
        loop.train(make_config(store, **{field: value}), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


@pytest.mark.full
def test_plateau_drops_the_rate_and_then_ends_the_run(store, tmp_path):
    """No error can fall by 200 points, so every evaluation after the first is a stall."""
    changes = {'schedule': 'plateau', 'patience': 1.0, 'threshold': 200.0, 'max_drops': 2}
    changes = {f'optim.{name}': value for name, value in changes.items()} | {'run.eval_every': 1.0}
    loop.train(make_config(store, **changes, **{'optim.epochs': 50.0}), tmp_path / 'run')
    rows = metrics.read(tmp_path / 'run')
    steps = [optim.steps_per(e, EXAMPLES, BATCH) for e in (1, 2, 3, 4)]
    assert [r['step'] for r in rows if r['kind'] == 'eval'] == steps == [3, 5, 8, 10]
    rates = [r['weights'] for r in rows if r['kind'] == 'train']
    assert rates == pytest.approx([0.02] * 5 + [0.002] * 3 + [0.0002] * 2)
    assert Checkpoints(tmp_path / 'run/checkpoints').steps()[-1] == 10


@pytest.mark.full
def test_several_steps_a_dispatch(store, tmp_path, monkeypatch):
    """Groups of three, except for steps 3 to 5, since step 5 is evaluated, and the last step.

    A run that is stopped and resumed gives the same bits; single steps give the same numbers up to
    rounding.
    """
    groups, make = [], loop.Setup.make

    def watched(*args):
        setup = make(*args)

        def train_steps(state, batches, rates):
            groups.append((int(state.step), len(batches['label'])))
            return setup.train_steps(state, batches, rates)

        return dataclasses.replace(setup, train_steps=train_steps)

    monkeypatch.setattr(loop.Setup, 'make', watched)
    every = {'run.eval_every': 2.0, 'run.checkpoint_every': 3, 'run.log_every': 3}
    config = make_config(store, **every, **{'run.dispatch': 3})
    loop.train(config, tmp_path / 'whole')
    assert groups == [(0, 3), (6, 3)]
    config.run.stop_after = '1'
    with pytest.raises(Stopped, match='stopped at step 3 '):
        loop.train(config, tmp_path / 'stopped')
    assert Checkpoints(tmp_path / 'stopped/checkpoints').steps() == [3]
    config.run.stop_after = ''
    loop.train(config, tmp_path / 'stopped')
    assert Checkpoints(tmp_path / 'stopped/checkpoints').steps()[-2:] == [9, 10]
    whole = outcome(tmp_path / 'whole')
    assert_same(outcome(tmp_path / 'stopped'), whole)
    config.run.dispatch = 1
    loop.train(config, tmp_path / 'one')
    one = outcome(tmp_path / 'one')[3]
    assert [(r['kind'], r['step']) for r in one] == [
        ('train', 2),
        ('eval', 5),
        ('train', 5),
        ('train', 8),
        ('eval', 10),
    ]
    for single, grouped in zip(one, whole[3], strict=True):
        assert single.pop('kind') == grouped.pop('kind')
        assert single == pytest.approx(grouped, rel=1e-4)


@pytest.mark.full
def test_the_steps_before_a_compilation_are_reported_before_it(store, tmp_path, monkeypatch):
    """Step 4 is the first single one: its compilation must not count in the rate of steps 2 and 3."""
    events, make, line = [], loop.Setup.make, loop.progress.line

    def watched(*args):
        setup = make(*args)

        def train_step(*args):
            events.append('one')
            return setup.train_step(*args)

        def train_steps(*args):
            events.append('two')
            return setup.train_steps(*args)

        return dataclasses.replace(setup, train_step=train_step, train_steps=train_steps)

    monkeypatch.setattr(loop.Setup, 'make', watched)
    monkeypatch.setattr(loop.progress, 'line', lambda *args: events.append('rate') or line(*args))
    every = {
        'run.eval_every': 2.0,
        'run.checkpoint_every': 100,
        'run.log_every': 2,
        'run.stop_after': '6',
    }
    with pytest.raises(Stopped):
        loop.train(make_config(store, **every, **{'run.dispatch': 2}), tmp_path / 'run')
    assert events == ['two', 'rate', 'two', 'rate', 'one', 'one', 'rate']


@pytest.mark.full
def test_a_dispatch_that_fits_nowhere_is_reported(store, tmp_path, caplog):
    config = make_config(
        store, **{'run.dispatch': 20, 'run.log_every': 20, 'run.checkpoint_every': 20}
    )
    config.run.stop_after = '1'
    with pytest.raises(Stopped):
        loop.train(config, tmp_path / 'run')
    assert 'config.run.dispatch=20: no group of this many steps fits' in caplog.text


@pytest.mark.full
def test_a_loss_that_is_not_finite_within_a_dispatch_is_found(store, tmp_path):
    changes = {'run.dispatch': 2, 'run.log_every': 2, 'run.eval_every': 9.0}
    config = make_config(store, **changes, **{'optim.rate': 1e30})
    with pytest.raises(UserError, match='the loss of step 1 is not finite: the activations of'):
        loop.train(config, tmp_path / 'run')


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(store, tmp_path):
    config = make_config(store, **{'optim.rate': 1e30, 'run.checkpoint_every': 1})
    where = (
        'the loss of step 1 is not finite: the activations .* broke first; .* step 1; likely causes'
    )
    with pytest.raises(UserError, match=where) as error:
        loop.train(config, tmp_path / 'run')
    assert '\n' not in str(error.value)
    # The first update is huge but finite; its consequences are not.
    assert Checkpoints(tmp_path / 'run/checkpoints').steps() == [1]
    assert [row['step'] for row in metrics.read(tmp_path / 'run')] == [0]


@pytest.mark.slow
def test_parameters_that_are_not_finite_are_never_saved(store, tmp_path, monkeypatch):
    """Whatever the cause: the loss of the step that they come from is still finite."""
    make = loop.Setup.make

    def poisoned(*args):
        setup = make(*args)

        def train_step(state, batch, rates):
            state, sums = setup.train_step(state, batch, rates)
            scale = jnp.nan if int(state.step) == 3 else 1.0
            return state.replace(params=jax.tree.map(lambda x: x * scale, state.params)), sums

        return dataclasses.replace(setup, train_step=train_step)

    monkeypatch.setattr(loop.Setup, 'make', poisoned)
    message = 'step 3 is not finite: .*; the latest checkpoint, .*, is from step 2;'
    with pytest.raises(UserError, match=message):
        loop.train(make_config(store, **{'run.checkpoint_every': 1}), tmp_path / 'run')
    assert Checkpoints(tmp_path / 'run/checkpoints').steps() == [1, 2]


@pytest.mark.slow
def test_a_loss_that_stays_at_chance_is_noticed(store, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(diagnosis, 'STUCK', 10.0)  # so that any loss counts as chance
    changes = {'run.stuck_after': 4, 'optim.epochs': 2.0}
    with caplog.at_level('WARNING'):
        loop.train(make_config(store, **changes), tmp_path / 'run')
    assert 'step 4: the loss has been at chance level, ln(3) = 1.0986, for 4 steps' in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize('failed_save', ['stop', 'warn'])
def test_a_checkpoint_that_cannot_be_written(store, tmp_path, monkeypatch, caplog, failed_save):
    """Like a full disk, it is noticed when the next checkpoint is due; that one is still saved."""
    wait, saved = Checkpoints.wait, []

    def fail_once(self):
        wait(self)
        if self.steps()[-1:] == [3] and 3 not in saved:
            saved.append(3)
            raise checkpoint.SaveError('no space for step 3')

    monkeypatch.setattr(Checkpoints, 'wait', fail_once)
    changes = {'run.failed_save': failed_save, 'run.checkpoint_every': 1, 'optim.epochs': 2.0}
    config = make_config(store, **changes, **{'run.eval_every': 10.0})
    if failed_save == 'stop':
        with pytest.raises(UserError, match='no space for step 3'):
            loop.train(config, tmp_path / 'run')
        assert Checkpoints(tmp_path / 'run/checkpoints').steps() == [2, 3]
    else:
        loop.train(config, tmp_path / 'run')
        assert 'no space for step 3; training continues without this checkpoint' in caplog.text
        assert Checkpoints(tmp_path / 'run/checkpoints').steps() == [4, 5]


@pytest.mark.slow
@pytest.mark.parametrize('saves', ['background', 'wait'])
def test_training_waits_for_checkpoints_where_it_should(store, tmp_path, monkeypatch, saves):
    events = []
    for name in ('save', 'wait'):
        real = getattr(Checkpoints, name)

        def noted(self, *args, real=real, name=name):
            events.append(name)
            real(self, *args)

        monkeypatch.setattr(Checkpoints, name, noted)
    changes = {'run.saves': saves, 'run.checkpoint_every': 2, 'optim.epochs': 1.0}
    loop.train(make_config(store, **changes), tmp_path / 'run')
    before = ['wait', 'save', 'wait']  # saving also waits for the previous checkpoint
    after = {'background': before, 'wait': [*before, 'wait']}[saves]
    assert events[: 2 * len(after)] == after * 2


@pytest.mark.slow
def test_the_first_error_is_the_one_reported(store, tmp_path, monkeypatch):
    def fail(message, kind):
        def raises(*args):
            raise kind(message)

        return raises

    monkeypatch.setattr(loop.Loop, 'run', fail('a damaged record', UserError))
    monkeypatch.setattr(Checkpoints, 'close', fail('no space', checkpoint.SaveError))
    with pytest.raises(UserError, match='a damaged record'):
        loop.train(make_config(store), tmp_path / 'run')
    monkeypatch.setattr(loop.Loop, 'run', lambda *args: None)
    with pytest.raises(UserError, match='no space'):
        loop.train(make_config(store), tmp_path / 'run')


@pytest.mark.full
def test_the_last_checkpoint_must_be_written(store, tmp_path, monkeypatch):
    save = Checkpoints.save

    def fail_at_the_end(self, step, *args):
        if step == 5:
            raise checkpoint.SaveError('no space for step 5')
        save(self, step, *args)

    monkeypatch.setattr(Checkpoints, 'save', fail_at_the_end)
    config = make_config(
        store, **{'run.failed_save': 'warn', 'optim.epochs': 2.0, 'run.eval_every': 10.0}
    )
    with pytest.raises(UserError, match='no space for step 5'):
        loop.train(config, tmp_path / 'run')


@pytest.mark.slow
def test_profile_and_frozen_layers(store, tmp_path):
    config = make_config(store, **{'run.profile': (1, 3), 'train.freeze': ('conv1', 'conv2')})
    loop.train(config, tmp_path / 'run')
    assert list((tmp_path / 'run/profile').rglob('*.xplane.pb'))
    checkpoints = Checkpoints(tmp_path / 'run/checkpoints')
    mesh, net = checks.check(config, tmp_path / 'run', build)
    setup = loop.Setup.make(config, mesh, loop.prepare.ensure(**config.data), net.clone(classes=3))
    trained, _, _ = setup.start(checkpoints, '')
    fresh, _, _ = setup.start(Checkpoints(tmp_path / 'none'), '')
    same = {
        layer: bool((trained.params[layer]['kernel'] == leaves['kernel']).all())
        for layer, leaves in fresh.params.items()
    }
    assert [layer for layer in same if same[layer]] == ['conv1', 'conv2']


@pytest.mark.parametrize(
    'devices, form',
    [
        (1, backend.CPU),
        (2, backend.CPU),
        (4, backend.CPU),
        (8, backend.CPU),
        (1, backend.GPU),
    ],
)
def test_every_picture_counts_once_on_any_number_of_devices(tmp_path, monkeypatch, devices, form):
    """37 images in batches of eight: the last one is mostly padding, and only padding on some devices."""
    monkeypatch.setattr(backend, 'CPU', form)
    pictures = np.arange(37, dtype=np.uint8)[:, None, None, None] + np.zeros((8, 8, 3), np.uint8)
    labels = np.arange(37, dtype=np.int32) % 3
    write_store(
        tmp_path / 's',
        format='u8',
        size=8,
        pictures={'train': pictures, 'val': pictures},
        labels={'train': labels, 'val': labels},
    )
    mesh = meshes.make((devices, 1), towers=1, batches={'batch': 8})

    def predict(images):  # right if the image's index is below 30
        number = images[:, 0, 0, 0].astype(int)
        return jax.nn.one_hot(jnp.where(number < 30, number, number + 1) % 3, 3)

    sums = evaluation.evaluate(
        [predict], mesh, open_store(tmp_path / 's'), split='val', batch=8, threads=1
    )
    assert (sums['count'], sums['top1'], sums['top5']) == (37, 30, 37)


def test_evaluations_are_due_after_whole_intervals(store):
    config = make_config(store, **{'run.eval_every': 0.5})

    class Counts:
        counts = {'train': EXAMPLES}

    setup = object.__new__(loop.Setup)
    object.__setattr__(setup, 'config', config)
    object.__setattr__(setup, 'store', Counts)
    # Half epochs end after 1.25, 2.5, 3.75, 5, ... steps.
    assert [s for s in range(11) if setup.evaluation_due(s)] == [2, 3, 4, 5, 7, 8, 9, 10]


class Pretended:
    """A setup, a writer and checkpoints for a Loop; every step has its number as its loss."""

    total, saturated, mesh = 40, None, None
    config = make_config('store', **{'run.log_every': 4, 'run.checkpoint_every': 4})
    store = SimpleNamespace(classes=3, counts={'train': EXAMPLES})

    def __init__(self, dispatch=1):
        self.count, self.done = dispatch, []

    def batches(self, step):
        return iter(range(self.total))

    def dispatched(self, step):
        return self.count

    def evaluation_due(self, step):
        return False

    over = Setup.over

    def rates(self, step, history):
        return {'weights': 0.1, 'stop': False}

    def train_step(self, state, batch, rates):
        numbers = np.arange(int(state.step), int(state.step) + self.count, dtype=float)
        sums = {'loss': 8 * numbers, 'count': np.full(self.count, 8.0)}
        sums |= {'top1': np.zeros(self.count), 'top5': np.zeros(self.count)}
        after = state.replace(step=state.step + self.count)
        return after, jax.tree.map(lambda x: x if self.count > 1 else x[0], sums)

    train_steps = train_step

    def all_finite(self, state):
        return True

    def write(self, *row):
        self.done.append(row[:2])

    def sync(self):
        pass

    def steps(self):
        return []

    def wait(self):
        pass

    def save(self, step, *args):
        self.done.append(('save', step))


@pytest.mark.parametrize(
    ('start', 'dispatch', 'last', 'lines', 'done'),
    [
        (0, 1, 2, ['step 1 of 40: loss 0.0000, compiled', 'step 2: stop'], [('save', 2)]),
        (0, 2, 2, ['step 2 of 40: loss 0.5000, compiled', 'step 2: stop'], [('save', 2)]),
        (
            6,
            1,
            9,
            ['step 7 of 40: loss 6.0000, compiled', 'step 8/40  ', 'step 9: stop'],
            [('train', 7), ('save', 8), ('save', 9)],
        ),
    ],
)
def test_what_a_start_says_first_and_last(
    tmp_path, monkeypatch, caplog, start, dispatch, last, lines, done
):
    monkeypatch.setattr(loop.meshes, 'global_batches', lambda mesh, batch, local: local)
    caplog.set_level('INFO', 'alexnet_jax')
    one = Pretended(dispatch)
    events = []
    monkeypatch.setattr(
        loop.log, 'info', lambda text, *args: events.append(text % args if args else text)
    )
    monkeypatch.setattr(
        one, 'save', lambda step, *args: events.append('save') or Pretended.save(one, step)
    )
    state = loop.TrainState(step=start, params={}, batch_stats={}, opt_state=())
    running = loop.Loop(one, tmp_path, one, one, state, {}, {})
    with pytest.raises(Stopped, match=f'stopped at step {last} \\(asked\\), saved'):
        running.run(lambda step: 'asked' if step == last else '')
    assert one.done == done
    said = [event for event in events if event != 'save']
    assert [text[: len(line)] for text, line in zip(said, lines, strict=True)] == lines
    assert said[-1] == f'step {last}: stopping (asked), saving a checkpoint'
    assert events[-2:] == [said[-1], 'save']


def test_lines_in_a_long_interval(tmp_path, monkeypatch):
    """The loop asks for one after every step except 4 and 8, which log full lines.

    It passes the number of images left until the next full line.
    """
    monkeypatch.setattr(loop.meshes, 'global_batches', lambda mesh, batch, local: local)
    said, left = [], []
    monkeypatch.setattr(loop.log, 'info', lambda text, *args: said.append(text))
    one = Pretended(1)
    state = loop.TrainState(step=0, params={}, batch_stats={}, opt_state=())
    running = loop.Loop(one, tmp_path, one, one, state, {}, {})
    monkeypatch.setattr(running.clock, 'said', lambda: said.append('first'))
    monkeypatch.setattr(running.clock, 'overdue', lambda images, n: left.append(n) or images / 10)
    with pytest.raises(Stopped):
        running.run(lambda step: 'asked' if step == 7 else '')
    assert left == [24, 16, 8, 24, 16, 8]
    assert said[0].startswith('step 1 of 40') and said[1] == 'first' and 'first' not in said[2:]
    assert [line for line in said if 'epoch' not in line and 'to go' in line][:2] == [
        'step 1/40  1 images/s  6m30s to go',
        'step 2/40  2 images/s  3m10s to go',
    ]


def test_the_start_of_the_input_does_not_count(tmp_path, monkeypatch):
    """The import of TensorFlow, for one, must not lengthen the remaining time."""
    one, now = Pretended(), iter([100.0, 200.0, 200.5, 201.0])
    monkeypatch.setattr(loop.progress.time, 'perf_counter', lambda: next(now))
    monkeypatch.setattr(one, 'batches', lambda step: iter([next(now)]))
    state = loop.TrainState(step=0, params={}, batch_stats={}, opt_state=())
    running = loop.Loop(one, tmp_path, one, one, state, {}, {})
    assert running.clock.interval(8.0)[1] == 16.0


def test_batches_are_made_while_a_step_runs(store, tmp_path, monkeypatch):
    """A step ends once two batches that nobody asked for have been made; its sums are read after the next one
    has begun."""
    without_tensorflow(monkeypatch)
    monkeypatch.setattr(loop.meshes, 'global_batches', lambda mesh, batch, local: local)
    one, made, events, cut = Pretended(), threading.Semaphore(0), [], batches._cut
    pretend = one.train_step

    def watched_cut(*args):
        batch = cut(*args)
        made.release()
        return batch

    class Sum:
        def __init__(self, step, value):
            self.step, self.value = step, value

        def __array__(self):
            events.append(f'sums {self.step}')
            return self.value

    def read(start):
        reading = batches.train_batches(
            open_store(store),
            seed=0,
            batch=BATCH,
            stop=40,
            crop=64,
            chunk=1,
            random=True,
            threads=2,
        )
        for step, batch in enumerate(reading):
            events.append(f'batch {step}')
            yield batch

    def train_step(state, batch, rates):
        events.append(f'step {state.step}')
        for _ in range(1 if state.step else 3):
            assert made.acquire(timeout=60)
        after, sums = pretend(state, batch, rates)
        return after, sums | {'loss': Sum(state.step, sums['loss'])}

    monkeypatch.setattr(batches, '_cut', watched_cut)
    monkeypatch.setattr(one, 'batches', read)
    monkeypatch.setattr(one, 'train_step', train_step)
    state = loop.TrainState(step=0, params={}, batch_stats={}, opt_state=())
    running = loop.Loop(one, tmp_path, one, one, state, {}, {})
    with pytest.raises(Stopped):
        running.run(lambda step: 'asked' if step == 4 else '')
    first = ['batch 0', 'step 0', 'batch 1', 'sums 0', 'step 1', 'batch 2']
    later = ['step 2', 'batch 3', 'sums 1', 'step 3', 'batch 4', 'sums 2', 'sums 3']
    assert events == first + later


def test_saturated_units_are_reported_at_the_first_start(store, tmp_path, caplog):
    changes = {'model.activation': 'tanh', 'run.stop_after': '1', 'model.std': (1.0,) + (0.01,) * 7}
    for dispatch in (1, 2):
        changes |= {'run.dispatch': dispatch, 'run.log_every': 2, 'run.checkpoint_every': 2}
        config = make_config(store, **changes)
        for warned in (True, False):
            caplog.clear()
            with pytest.raises(Stopped):
                loop.train(config, tmp_path / str(dispatch))
            assert ('saturated at the start (act1' in caplog.text) == warned
