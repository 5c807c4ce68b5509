"""The commands as users run them: what they refuse, and one small run from end to end."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import alexnet_jax
from alexnet_jax import main
from alexnet_jax.common.errors import UserError
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.input.images import square
from alexnet_jax.rundir import metrics
from alexnet_jax.training import inference
from tests.helpers import ROOT, fixtures
from tests.helpers.commands import WITHOUT_TENSORFLOW
from tests.helpers.processes import compilation_cache
from tests.helpers.run_dirs import call
from tests.helpers.stores import write_store

SMALL = {
    'data.source': 'made_up',
    'data.size': 72,
    'augment.crop': 64,
    'train.batch': 8,
    'run.eval_batch': 8,
    'optim.epochs': 1.0,
}

# Like `python -m alexnet_jax.prepare` on a disk with one free megabyte.
SMALL_DISK = """
import collections, shutil, sys
shutil.disk_usage = lambda path: collections.namedtuple('usage', 'free')(10**6)
from alexnet_jax import command, prepare
command.run(prepare.main)
"""


def flags(**fields):
    """--config.NAME=VALUE; two underscores in a name stand for a dot."""
    return [f'--config.{name.replace("__", ".")}={value}' for name, value in fields.items()]


def small(store, **changes):
    fields = SMALL | {'data.store': store} | {k.replace('__', '.'): v for k, v in changes.items()}
    return ['--config=configs/quickstart.py', '--cpu_devices=2', *flags(**fields)]


@pytest.fixture(scope='session')
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='session')
def no_jax(tmp_path_factory):
    """An import path where importing jax fails: for answers that must come immediately."""
    folder = tmp_path_factory.mktemp('no_jax')
    (folder / 'jax.py').write_text('raise AssertionError("JAX was imported")\n')
    return folder


class Place:
    """A folder to start commands in, without any dataset."""

    def __init__(self, folder, cache):
        self.folder, self.cache = folder, cache
        (folder / 'nothing').mkdir()

    def run(self, *command, first_path=None):
        path = [str(p) for p in (first_path, ROOT) if p]
        environment = (
            os.environ
            | compilation_cache(self.cache)
            | {
                'PYTHONPATH': os.pathsep.join(path),
                'PYTHONDONTWRITEBYTECODE': '1',
                'TFDS_DATA_DIR': str(self.folder / 'nothing'),
            }
        )
        if command[0] != '-c':
            raw = '--config.data.source=made_up' in command or command[0] == 'evaluate'
            start = ('-c', WITHOUT_TENSORFLOW) if raw else ('-m',)
            command = (*start, f'alexnet_jax.{command[0]}', *command[1:])
        return subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def files(self):
        """Everything below the folder, by path: bytes of files, None for folders."""
        paths = [pathlib.Path(d, n) for d, ds, fs in os.walk(self.folder) for n in (*ds, *fs)]
        return {path: path.read_bytes() if path.is_file() else None for path in paths}

    def refuses(self, command, *parts, first_path=None):
        """Asserts that a command fails with one line that has all `parts`, and changes no file."""
        before = self.files()
        done = self.run(*command, first_path=first_path)
        assert done.returncode == 2, done.stdout[-1000:] + done.stderr[-3000:]
        assert re.fullmatch(r'error: [^\n]+\n', done.stderr), done.stderr[-3000:]
        assert 'Traceback' not in done.stdout
        for part in parts:
            assert part in done.stderr, (part, done.stderr)
        assert self.files() == before
        return done.stderr

    def succeeds(self, command):
        done = self.run(*command)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        return done.stdout


@pytest.fixture
def place(tmp_path, cache):
    return Place(tmp_path, cache)


@pytest.mark.parametrize(
    ('line', 'code', 'words'),
    [
        ('print("line")', 141, ''),
        ('print(100_000 * "line\\n")', 141, ''),
        ('[logging.warning("line") for _ in range(3)]', 0, ''),  # training continues
        # another pipe
        ('raise BrokenPipeError(32, "Broken pipe", "gs://bucket")', 1, 'gs://bucket'),
    ],
)
def test_output_that_nobody_reads(line, code, words):
    script = (
        'import logging\nfrom alexnet_jax.command import log_to_stdout, run\n'
        f'def main():\n    log_to_stdout()\n    {line}\nrun(main)'
    )
    process = subprocess.Popen(
        [sys.executable, '-c', script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if not words:
        process.stdout.close()
    said = process.stderr.read()
    assert process.wait(60) == code and words in said and bool(said) == bool(words), said


# Mistakes in flags or the config file are reported before JAX is imported

PAPER = '--config=configs/paper.py'
CONFIG_FILES = {
    'syntax.py': 'def get_config(:\n    return 1\n',
    'wrong_type.py': (
        'from configs import base\n\n\ndef get_config():\n    config = base.get_config()\n'
        "    config.model.width = 'wide'\n    return config\n"
    ),
    'import.py': 'import a_module_that_nobody_has\n',
    'none.py': 'def get_config():\n    pass\n',
    'empty.py': '',
}
FLAGS = {
    'no --config': ([], ['--config is missing', 'for example, --config=configs/paper.py']),
    'empty --config': (['--config='], ['--config is missing']),
    '--config without a value': (['--config'], ['Missing value for flag --config']),
    'unknown preset': (
        ['--config=configs/papre.py'],
        [
            '--config=configs/papre.py: no such file or preset (did you mean paper?)',
            'caffe, caffenet',
        ],
    ),
    'unknown name': (['--config=papre:tanh'], ['no such file or preset (did you mean paper?)']),
    'missing file': (['--config=mine/paper.py'], ['mine/paper.py: no such file or preset']),
    'a folder': (['--config=configs'], ['--config=configs: no such file or preset']),
    'unknown variant': (
        ['--config=configs/paper.py:tnah'],
        ["no variant 'tnah'", 'one of text, tanh'],
    ),
    'another variant': (
        ['--config=squeezenet:1.2'],
        ["--config=squeezenet:1.2: no variant '1.2' of this config; choose one of 1.1"],
    ),
    'no variants': (['--config=configs/caffe.py:tanh'], ['no variants: --config=configs/caffe.py']),
    'syntax': (['--config=syntax.py'], ['SyntaxError', 'syntax.py, line 1']),
    'type in a file': (['--config=wrong_type.py'], ['line 6', "'width'", 'float']),
    'import in a file': (['--config=import.py'], ['line 1', 'a_module_that_nobody_has']),
    'a file that returns nothing': (['--config=none.py'], ['none.py', 'define get_config()']),
    'an empty file': (['--config=empty.py'], ['empty.py', 'must define get_config()']),
    'unknown field': (
        [PAPER, '--config.model.activaton=tanh'],
        ['config.model.activaton', 'no such field', 'config.model.activation', 'configs/base.py'],
    ),
    'unknown section': (
        [PAPER, '--config.modle.width=2'],
        ['config.modle.width', 'did you mean config.model.width?'],
    ),
    'a field without its section': (
        [PAPER, '--config.batch=8'],
        ['did you mean config.train.batch?'],
    ),
    'a section': (
        [PAPER, '--config.model=3'],
        ['config.model: no such field', 'config.model.activation'],
    ),
    'nothing like it': ([PAPER, '--config.foo=3'], ['config.foo: no such field; configs']),
    'word for int': ([PAPER, '--config.train.batch=many'], ['train.batch=many', 'int', '128']),
    'float for int': ([PAPER, '--config.train.batch=1.5'], ['train.batch=1.5', 'int', '128']),
    'word for float': ([PAPER, '--config.optim.rate=big'], ['optim.rate=big', 'float', '0.01']),
    'word for bool': ([PAPER, '--config.augment.random=maybe'], ['=maybe', 'bool', 'True']),
    'no tuple': ([PAPER, '--config.model.kernels=(1,2'], ['kernels=(1,2', 'tuple', '(96, 256']),
    'word in a tuple': (
        [PAPER, "--config.model.kernels=(96,256,'a',384,256)"],
        ['model.kernels', "'a'", 'int'],
    ),
    'float in a tuple': ([PAPER, '--config.run.mesh=(1.5,2)'], ['run.mesh', '1.5', 'int']),
    'negative': ([PAPER, '--config.seed=-1'], ['config.seed=-1', 'must not be negative']),
    'negative in a tuple': ([PAPER, '--config.run.mesh=(-1,2)'], ['run.mesh', 'negative']),
    'not a number': ([PAPER, '--config.optim.rate=nan'], ['config.optim.rate=nan', 'finite']),
    'infinite': ([PAPER, '--config.optim.epochs=inf'], ['config.optim.epochs=inf', 'finite']),
    'unknown flag': (
        [PAPER, '--batch=8'],
        ['--batch: no such flag', 'set a field of the config as in --config.train.batch=64'],
    ),
    'a flag of prepare': ([PAPER, '--skip_bad'], ['--skip_bad: run python -m alexnet_jax.prepare']),
    'mistyped flag': ([PAPER, '--cpu_device=2'], ['--cpu_device: ', 'did you mean --cpu_devices?']),
    'wrong flag value': ([PAPER, '--cpu_devices=two'], ['--cpu_devices=two', 'int']),
    'stray arguments': ([PAPER, 'really', 'now'], ['really now', 'not a flag', '--workdir=']),
}


@pytest.mark.parametrize('case', FLAGS)
def test_wrong_flags(place, no_jax, case):
    arguments, parts = FLAGS[case]
    for name, text in CONFIG_FILES.items():
        (place.folder / name).write_text(text)
    place.refuses(('main', *arguments), *parts, first_path=no_jax)


def test_a_config_file_executes_once(tmp_path):
    file = tmp_path / 'counting.py'
    file.write_text(
        f'from configs import base\n\nopen({str(tmp_path / "count")!r}, "a").write("x")\n\n\n'
        f'def get_config(name="none"):\n    open({str(tmp_path / "count")!r}, "a").write(name[0])\n'
        '    return base.get_config()\n'
    )
    flags = [
        f'--config={file}:fast',
        '--config.seed=3',
        '--config.model.kernels=(96,)',
        '--workdir=w',
    ]
    args = main.parse(['main', *flags])
    assert (tmp_path / 'count').read_text() == 'xf'
    assert (args.config.seed, args.config.model.kernels, args.workdir) == (3, (96,), 'w')
    assert main.parse(['main', flags[0]]).workdir == 'runs/counting-fast'


@pytest.mark.parametrize(
    'arguments',
    [
        ['--config.run.mesh=(2,1)', '--config.run.mesh=(1,1)'],
        ['--config.run.mesh=(1,2)', '--config.seed=3', '-config.run.mesh', '(1,1)'],
        ['--config.run.mesh', '(2,1)', '--noconfig.augment.random', '--config.run.mesh=(1,1)'],
    ],
)
def test_the_last_value_of_a_tuple_counts(arguments):
    """As with every other flag; an experiment's own arguments precede those after its `--`."""
    more = ['--config.train.freeze=conv1', '--config.optim.drops=()']
    config = main.parse(['main', PAPER, *arguments, *more]).config
    assert (config.run.mesh, config.train.freeze, config.optim.drops) == ((1, 1), ('conv1',), ())


def test_help(place, no_jax):
    done = place.run('main', '--help', first_path=no_jax)
    assert done.returncode == 0 and not done.stderr
    for text in ('--config=configs/paper.py', '--cpu_devices', 'squeezenet'):
        assert text in done.stdout


def test_wrong_arguments_of_the_other_commands(place, no_jax):
    place.refuses(('prepare',), '--source', '--help', first_path=no_jax)
    place.refuses(('prepare', '--source=x', '--size=big'), '--size', "'big'", first_path=no_jax)
    place.refuses(('evaluate',), 'RUN', '--help')


# Values that exist but cannot be used

VALUES = {
    'crop larger than the images': (
        {'augment.crop': 80},
        ['config.augment.crop=80', 'config.data.size=72'],
    ),
    'crop too small for the net': (
        {'augment.crop': 20},
        ['config.augment.crop=20', 'nothing is left'],
    ),
    'seed too large': ({'seed': 2**32}, ['config.seed=4294967296', 'below 2^32']),
    'chunk 0': ({'augment.chunk': 0}, ['config.augment.chunk=0', 'at least 1']),
    'dispatch': (
        {'run.dispatch': 8},
        ['config.run.log_every=', 'a multiple of config.run.dispatch=8'],
    ),
    'log_every 0': ({'run.log_every': 0}, ['config.run.log_every=0', 'above 0']),
    'keep 0': ({'run.keep': 0}, ['config.run.keep=0', 'above 0']),
    'one number for the mesh': ({'run.mesh': 2}, ['config.run.mesh=(2,)', 'two numbers']),
    'unknown activation': (
        {'model.activation': 'sine'},
        ["config.model.activation='sine'", 'relu, tanh'],
    ),
    'no towers': ({'model.towers': 0}, ['config.model.towers=0', 'above 0']),
    'width that does not divide': (
        {'model.width': 0.3},
        ['config.model: 96 kernels', 'width=0.3 cannot be divided'],
    ),
    'unknown schedule': (
        {'optim.schedule': 'zigzag'},
        ["config.optim.schedule='zigzag'", 'steps, plateau'],
    ),
    'words for epochs': ({'optim.drops': 'abc'}, ["config.optim.drops=('abc',)", 'float', '(28.0']),
    'words for a rate': (
        {'optim.conv1': 'abc'},
        ["config.optim.conv1=('abc',)", 'an epoch and a rate'],
    ),
    'a layer without its decay': (
        {'optim.decays': "('fc8',)"},
        ["config.optim.decays=('fc8',)", 'pairs'],
    ),
    'words for a decay': ({'optim.decays': "(('fc8', 'x'),)"}, ['config.optim.decays', 'pairs']),
    'a decay of no layer': (
        {'optim.decays': "(('fc9', 0.1),)"},
        ["decays: no layer 'fc9'", 'conv1, conv2'],
    ),
    'unknown layer': (
        {'train.freeze': 'conv9'},
        ["config.train.freeze: no layer 'conv9'", 'conv1'],
    ),
    'a number for a layer': (
        {'train.freeze': '(1,)'},
        ['config.train.freeze: no layer 1', 'conv1'],
    ),
    'batch 0': ({'train.batch': 0}, ['config.train.batch=0', 'at least 1']),
    'batch over the mesh': (
        {'train.batch': 7, 'run.mesh': '(2,1)'},
        ['config.train.batch=7', '2 devices', 'config.run.mesh'],
    ),
    'eval_batch over the mesh': (
        {'run.eval_batch': 7, 'run.mesh': '(2,1)'},
        ['config.run.eval_batch=7', '2 devices'],
    ),
    'more than the devices': (
        {'run.mesh': '(8,2)'},
        ['config.run.mesh', '16 devices', '--cpu_devices'],
    ),
}


@pytest.mark.parametrize('case', VALUES)
def test_impossible_values(tmp_path, monkeypatch, case):
    """Runs in this process, because starting one for each value takes a minute."""
    changes, parts = VALUES[case]
    monkeypatch.chdir(tmp_path)
    fields = SMALL | {'data.store': 'never_read'} | changes
    with pytest.raises(UserError) as refused:
        call(monkeypatch, main, '--config=configs/quickstart.py', *flags(**fields))
    line = str(refused.value)
    assert [part for part in (*parts, line) if part not in line or '\n' in part] == []
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_an_impossible_value_ends_the_program(place):
    changes, parts = VALUES['crop larger than the images']
    place.refuses(('main', *small('never_read', **changes)), *parts)


@pytest.mark.slow
def test_towers_on_devices_that_do_not_fit(place):
    odd = [*small('never_read', run__mesh='(0,2)'), '--cpu_devices=3']  # the last flag wins
    place.refuses(('main', *odd), 'config.run.mesh', 'model=2', '3 devices', 'model=1')
    single = [PAPER.replace('paper', 'one_gpu'), '--cpu_devices=2', '--config.run.mesh=(1,2)']
    place.refuses(('main', *single), 'config.run.mesh', 'model=2', '1 tower:', 'model=1')


# Data


def test_paper_without_imagenet(place):
    """The error says which two files go where, how large they are, and what works without them."""
    line = place.refuses(('main', PAPER), 'imagenet2012', '--config=quickstart', 'data.dir')
    nothing = place.folder / 'nothing'
    for tar in (r'ILSVRC2012_img_train\.tar \(138 GB\)', r'ILSVRC2012_img_val\.tar \(6\.3 GB\)'):
        assert re.search(tar + '.* into ' + re.escape(f'{nothing}, '), line), line
    place.refuses(('prepare', '--source=imagenet2012'), f'into {nothing}, ', '(--dir)')


def test_pictures_that_cannot_be_prepared(place):
    tree = fixtures.write_tree(place.folder / 'flowers' / 'train', {'rose': 3, 'tulip': 3}).parent
    fixtures.write_tree(tree / 'val', {'rose': 1, 'tulip': 1})
    prepared = ('prepare', '--source=flowers', '--size=32')
    (tree / 'train' / 'lily').mkdir()
    place.refuses(prepared, 'flowers/train/lily', 'empty', 'put images there or remove it')
    (tree / 'train' / 'lily').rmdir()
    command = ('-c', SMALL_DISK, '--source=flowers', '--size=512')
    place.refuses(command, 'data/flowers-512-jpg', 'GB for 8 images', 'GB are free', '--store')
    bad = tree / 'train' / 'tulip' / '001.jpg'
    bad.write_bytes(bad.read_bytes()[:500])
    place.refuses(prepared, 'flowers: 1 of 8', 'train/tulip/001.jpg', 'cannot be decoded', 'repair')
    place.refuses(('prepare', '--source=./flower'), './flower', 'no such folder')


@pytest.mark.slow
def test_training_refuses_the_same_pictures(place):
    tree = fixtures.write_tree(place.folder / 'flowers', {'rose': 3, 'tulip': 3})
    command = ('main', *small('', data__source='flowers', data__val_fraction=0.4))
    (tree / 'tulip' / '001.jpg').write_bytes((tree / 'tulip' / '001.jpg').read_bytes()[:500])
    place.refuses(command, 'flowers: 1 of 6', 'tulip/001.jpg', 'cannot be decoded', '--skip_bad')
    shutil.rmtree(tree / 'tulip')
    (tree / 'tulip').mkdir()
    place.refuses(command, 'flowers/tulip', 'empty')


@pytest.mark.slow
def test_labels_outside_the_class_count(place):
    labels = {'train': np.arange(16) % 4, 'val': np.arange(8) % 3}
    write_store(
        place.folder / 'store',
        format='u8',
        size=72,
        classes=3,
        counts={'train': 16, 'val': 8},
        labels=labels,
    )
    place.refuses(
        ('main', *small('store')), 'store/train.labels.npy', 'record 3', 'label 3', '0..2'
    )


# One small run


@pytest.fixture(scope='module')
def world(tmp_path_factory, cache):
    """A place with a store and a finished run, `run`."""
    place = Place(tmp_path_factory.mktemp('world'), cache)
    counts = {'train': 16, 'val': 11}
    place.pictures = write_store(
        place.folder / 'tiny', format='u8', size=72, classes=3, counts=counts
    )
    place.said = place.succeeds(('main', *small('tiny'), '--workdir=run'))
    return place


@pytest.fixture
def copied(world, tmp_path):
    """A copy of `world` in its own folder."""
    shutil.copytree(world.folder, tmp_path / 'copy', symlinks=True)
    (tmp_path / 'copy' / 'nothing').rmdir()
    return Place(tmp_path / 'copy', world.cache)


@pytest.mark.slow
def test_a_run_leaves_what_later_use_needs(world):
    run = world.folder / 'run'
    assert sorted(p.name for p in world.folder.iterdir()) == ['nothing', 'run', 'tiny']
    config = json.loads((run / 'config.json').read_text())
    assert config['augment']['crop'] == 64 and config['data']['store'] == 'tiny'
    (start,) = json.loads((run / 'run.json').read_text())
    assert '--workdir=run' in start['command'] and len(start['devices']) == 2
    assert start['versions']['jax'] == jax.__version__ and start['commit']
    rows = metrics.read(run)
    assert [r['step'] for r in rows if r['kind'] == 'eval'] == [2]
    assert (run / 'names.txt').read_text() == (world.folder / 'tiny' / 'names.txt').read_text()
    with np.load(run / 'stats.npz') as stats:
        mean = world.pictures['train'].mean(axis=0)
        np.testing.assert_allclose(stats['mean'], mean, atol=1e-3)
    assert (run / 'checkpoints' / '2').is_dir()
    assert list((run / 'tensorboard').rglob('events.out.tfevents.*'))
    assert 'each tower on its own device' in world.said
    assert 'python -m alexnet_jax.evaluate run' in world.said


@pytest.mark.slow
def test_a_run_is_evaluated_from_any_folder(world, tmp_path):
    """`tiny`, its store, is relative to the folder where it was trained."""
    there, run = Place(tmp_path, world.cache), world.folder / 'run'
    table = there.succeeds(('evaluate', str(run), '--views=center'))
    assert f'{run} (step 2)' in table and ' 11\n' in table
    shutil.copytree(run, tmp_path / 'moved')
    starts = json.loads((run / 'run.json').read_text())
    assert starts[-1]['store'] == str(world.folder / 'tiny')
    starts[-1]['store'] = str(tmp_path / 'gone')
    (tmp_path / 'moved' / 'run.json').write_text(json.dumps(starts))
    there.refuses(('evaluate', 'moved', '--views=center'), 'made_up')
    there.succeeds(('evaluate', 'moved', '--views=center', f'--store={world.folder / "tiny"}'))


@pytest.mark.slow
def test_the_same_command_again_has_nothing_left_to_do(world):
    before = world.files()
    said = world.succeeds(('main', *small('tiny'), '--workdir=run'))
    assert said.splitlines()[-1] == 'run: nothing left to do, the run ended at step 2'
    assert world.files() == before


@pytest.mark.slow
def test_another_configs_work_directory(world):
    command = ('main', *small('tiny', model__activation='tanh', seed=1), '--workdir=run')
    world.refuses(
        command,
        'run holds a run with a different config',
        "config.model.activation: 'relu' there",
        'config.seed: 0 there, 1 here',
        '--workdir',
    )


@pytest.mark.slow
def test_missing_and_damaged_checkpoints(copied):
    evaluated = ('evaluate', '--cpu_devices=2', 'run')
    trained = ('main', *small('tiny', optim__epochs=1.0), '--workdir=run')
    copied.refuses(('evaluate', 'nowhere'), 'nowhere: not a run directory', 'nowhere/config.json')
    copied.refuses(('evaluate', 'tiny'), 'tiny: not a run directory')
    copied.refuses((*evaluated, '--step=7'), 'checkpoints', 'no checkpoint of step 7', '[2]')
    init = ('main', *small('tiny', train__init_from='nowhere'), '--workdir=other')
    copied.refuses(init, 'nowhere: not a run directory')
    for file in (copied.folder / 'run' / 'checkpoints' / '2').rglob('*'):
        if file.is_file() and file.stat().st_size:
            file.write_bytes(file.read_bytes()[:-1] + b'?')
    for command in (evaluated, trained):
        copied.refuses(command, 'run/checkpoints: every checkpoint here is damaged ([2])')
    shutil.rmtree(copied.folder / 'run' / 'checkpoints')
    copied.refuses(evaluated, 'run/checkpoints: there is no checkpoint here')
    init = ('main', *small('tiny', train__init_from='run'), '--workdir=other')
    copied.refuses(init, 'run/checkpoints: there is no checkpoint here')


@pytest.mark.slow
def test_init_from_another_network(world):
    init = small('tiny', train__init_from='run', model__width=0.125)
    world.refuses(('main', *init, '--workdir=other'), 'init_from=run', 'another network', 'conv1/')


@pytest.mark.slow
def test_an_unusable_work_directory(world):
    world.refuses(
        ('main', *small('tiny'), '--workdir=run/run.json'), 'run/run.json', 'not a writable folder'
    )
    world.refuses(
        ('main', *small('tiny'), '--workdir=run/run.json/a'),
        'run/run.json',
        'not a writable folder',
    )


@pytest.fixture(scope='module')
def second(world):
    """Another run, `again`: from the parameters of `run`, on four classes, at learning rate 0."""
    counts = {'train': 16, 'val': 8}
    write_store(world.folder / 'four', format='u8', size=72, classes=4, counts=counts, seed=1)
    command = ('main', *small('four', train__init_from='run', optim__rate=0.0), '--workdir=again')
    return world.succeeds(command)


SIDES = [(100, 80), (72, 72), (40, 90)]  # width and height


def table(text):
    """The rows of the printed table, {(name, crops): (top-1, per-class error, images)}, of few classes."""
    lines = text.splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith('Model ')]
    assert lines[heads[0]].split() == [*('Model', 'Crops', 'Top-1', 'Per-class', 'Images')], text
    pattern = r'(.*?) +(1|10)' + r' +([\d.]+)%' * 2 + r' +(\d+)'
    matches = filter(None, (re.fullmatch(pattern, line) for line in lines[heads[0] + 1 :]))
    return {(m[1], int(m[2])): (float(m[3]), float(m[4]), int(m[5])) for m in matches}


@pytest.mark.slow
def test_evaluating_and_loading_agree(world):
    """On 11 images in batches of 4: not a multiple, so that counting twice would show."""
    shutil.copytree(world.folder / 'run', world.folder / 'twin', dirs_exist_ok=True)
    try:
        said = world.succeeds(
            ('evaluate', '--cpu_devices=2', '--batch=4', '--per_class', 'run', 'twin')
        )
    finally:
        shutil.rmtree(world.folder / 'twin')
    rows = table(said)
    names = ['run (step 2)', 'twin (step 2)', '2 CNNs']
    assert sorted(rows) == sorted((name, crops) for name in names for crops in (1, 10))
    (evaluated,) = (r for r in metrics.read(world.folder / 'run') if r['kind'] == 'eval')
    labels = np.arange(11) % 3
    for views, crops in (('center', 1), ('ten', 10)):
        classify = alexnet_jax.load(world.folder / 'run', views=views)
        assert classify.names == ['class 0', 'class 1', 'class 2']
        with pytest.raises(UserError, match='views'):
            alexnet_jax.load(world.folder / 'run', views='eleven')
        probabilities = classify(world.pictures['val'])
        assert probabilities.shape == (11, 3)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)
        wrong = probabilities.argmax(axis=1) != labels
        top1, each = 100 * wrong.mean(), [100 * wrong[labels == k].mean() for k in range(3)]
        expected = (round(top1, 2), round(np.mean(each), 2), 11)
        for name in names:
            assert rows[name, crops] == expected
        column = [
            line.split(')')[0][1:] for line in said.splitlines() if f'run (step 2), {views}' in line
        ]
        for k, error in enumerate(each):
            cells = re.search(rf'^class {k}  +(.*?)  +(\d+)$', said, re.M)
            errors = cells[1].replace('%', '').split()
            assert float(errors[int(column[0]) - 1]) == round(error, 1)
            assert int(cells[2]) == (labels == k).sum()
        if crops == 1:
            assert evaluated['top1_error'] == pytest.approx(top1)
            loss = -np.log(probabilities[np.arange(11), labels]).mean()
            assert evaluated['loss'] == pytest.approx(loss, rel=1e-4)
            center = probabilities
    assert np.abs(probabilities - center).max() > 1e-4  # ten crops differ from the center crop
    several = [np.asarray(fixtures.picture(i, *side)) for i, side in enumerate(SIDES)]
    mixed = classify([*several, *world.pictures['val'][:8]])
    np.testing.assert_allclose(mixed.sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(mixed[3:], probabilities[:8], atol=1e-6)
    squares = [square(picture, 72) for picture in several]
    np.testing.assert_allclose(
        classify([*squares, *squares, *world.pictures['val'][:5]])[:3], mixed[:3], atol=1e-6
    )


@pytest.mark.slow
def test_starting_from_another_run_with_other_classes(world, second):
    assert 'starting from run, step 2, with a new last layer' in second
    world.refuses(('evaluate', 'run', 'again'), 'different classes')
    world.refuses(
        ('evaluate', 'run', '--store=four'),
        'four does not have the classes',
        'the first that differs: ',
        '--store=DIR',
    )
    mesh = meshes.make((1, 1), towers=2, batches={})
    runs = [inference.open_run(world.folder / name, mesh) for name in ('run', 'again')]
    first, again = (jax.tree.map(np.asarray, r.variables['params']) for r in runs)
    for layer in set(first) - {'fc8'}:
        for name, value in first[layer].items():
            np.testing.assert_array_equal(value, again[layer][name], err_msg=f'{layer}/{name}')
    kernels = first['fc8']['kernel'], again['fc8']['kernel']
    assert [k.shape[-1] for k in kernels] == [3, 4]
    assert not np.allclose(kernels[0], kernels[1][..., :3])
    assert kernels[1].std() == pytest.approx(0.01 * 0.25**-0.5, rel=0.1)  # as at any start
