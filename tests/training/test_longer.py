"""A run continues with another schedule if that gives the same rates for the steps already taken."""

import json

import pytest

from alexnet_jax.common.errors import Stopped, UserError
from alexnet_jax.rundir import directory, metrics
from alexnet_jax.rundir.checkpoint import Checkpoints
from alexnet_jax.training import loop
from tests.helpers.commands import assert_same, outcome
from tests.helpers.stores import write_store
from tests.training.test_contract import SIZE, build, make_config

PLATEAU = {'schedule': 'plateau', 'patience': 1.0, 'threshold': 200.0}  # every evaluation stalls
OTHERS = [
    ({'epochs': 2.0}, {'epochs': 4.0, 'drops': (3.0,)}),
    # The rule ended this run, at step 5.
    ({'epochs': 9.0, 'max_drops': 0, **PLATEAU}, {'epochs': 9.0, 'max_drops': 1, **PLATEAU}),
    ({'epochs': 1.6}, {'epochs': 9.0, 'max_drops': 1, **PLATEAU}),
    ({'epochs': 3.2, 'drops': (2.0,)}, {'epochs': 2.8}),  # shorter
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('longer')
    counts = {'train': 20, 'val': 11}  # two and a half steps per epoch
    write_store(folder / 'three', format='u8', size=SIZE, classes=3, counts=counts)
    return folder


def config_of(folder, optim, **run):
    changes = {f'optim.{name}': value for name, value in optim.items()}
    changes |= {f'run.{name}': value for name, value in run.items()}
    return make_config(folder, 'nested', **changes)


def train(folder, workdir, optim, **run):
    loop.train(config_of(folder, optim, **run), workdir, build)


def files(workdir):
    return {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ('before', 'after'),
    [
        # Step 4 was evaluated only because it was the last one.
        ({'epochs': 1.6, 'warmup': 1.2}, {'epochs': 3.2, 'warmup': 1.2, 'colour_off': 1.6}),
        ({'epochs': 1.6, **PLATEAU}, {'epochs': 9.0, 'max_drops': 1, **PLATEAU}),
        *(pytest.param(*pair, marks=pytest.mark.full) for pair in OTHERS),
    ],
    ids=str,
)
def test_a_longer_run_has_the_bits_of_one_that_was_as_long_from_the_start(
    folder, tmp_path, before, after
):
    whole, longer = tmp_path / 'whole', tmp_path / 'longer'
    train(folder, whole, after)
    if after['epochs'] < before['epochs']:
        with pytest.raises(Stopped):
            train(folder, longer, before, stop_after='4')
    else:
        train(folder, longer, before)
    train(folder, longer, after)
    assert_same(outcome(longer), outcome(whole))
    assert Checkpoints(longer / 'checkpoints').best_step() == (
        Checkpoints(whole / 'checkpoints').best_step()
    )
    assert directory.read_config(longer) == directory.read_config(whole)
    assert len(json.loads((longer / 'run.json').read_text())) == 2


@pytest.mark.full
def test_a_run_can_end_where_it_was_stopped(folder, tmp_path):
    """Its last step is then evaluated, as if it had been the last one from the start."""
    train(folder, tmp_path / 'whole', {'epochs': 1.6})
    with pytest.raises(Stopped):
        train(folder, tmp_path / 'run', {'epochs': 4.0}, stop_after='4')
    train(folder, tmp_path / 'run', {'epochs': 1.6})
    assert_same(outcome(tmp_path / 'run'), outcome(tmp_path / 'whole'))


@pytest.mark.slow
@pytest.mark.parametrize('again', [3.2, pytest.param(1.6, marks=pytest.mark.full)])
def test_a_start_killed_before_it_wrote_the_new_config(folder, tmp_path, monkeypatch, again):
    train(folder, tmp_path / 'whole', {'epochs': again})
    train(folder, tmp_path / 'run', {'epochs': 1.6})

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(directory, 'write', killed)
        train(folder, tmp_path / 'run', {'epochs': 3.2})
    train(folder, tmp_path / 'run', {'epochs': again})
    assert_same(outcome(tmp_path / 'run'), outcome(tmp_path / 'whole'))
    before = files(tmp_path / 'run')
    train(folder, tmp_path / 'run', {'epochs': again})  # nothing is left to do
    assert files(tmp_path / 'run') == before


@pytest.fixture(scope='module')
def ended(folder):
    """A run of five steps, evaluated at steps 3 and 5."""
    train(folder, folder / 'ended', {'epochs': 2.0, 'drops': (1.0,)})
    return folder / 'ended'


@pytest.mark.parametrize(
    ('optim', 'words'),
    [
        ({'epochs': 4.0}, r'optim.drops: \[1.0\] there, \[\] here; config.optim.epochs: 2.0 there, '
         r'4.0 here\); completed steps must keep their rates, which differ from step 3 on '
         r'\(weights 0.01 there, 0.1 here\); give'),
        ({'epochs': 4.0, 'drops': (1.0,), 'warmup': 1.2}, 'from step 0 on .weights 0.1 there, 0.03'),
        ({'epochs': 4.0, 'drops': (1.0,), 'bias_factor': 2.0}, 'from step 0 on .biases 0.1 there'),
        ({'epochs': 4.0, 'drops': (1.0,), 'colour_off': 1.0}, 'from step 3 on .colour 1 there'),
        ({'epochs': 4.0, 'schedule': 'poly'}, 'from step 1 on .weights 0.1 there, 0.081 here'),
        ({'epochs': 1.6, 'drops': (1.0,)}, 'would have ended at step 4;'),
        ({'epochs': 4.0, 'drops': (1.0,), 'momentum': 0.5},
         r'\(config.optim.momentum: 0.9 there, 0.5 here\); give'),
    ],
    ids=str,
)  # fmt: skip
def test_other_rates_are_refused(folder, ended, optim, words):
    before = files(ended)
    with pytest.raises(UserError, match=words) as error:
        train(folder, ended, optim)
    assert '\n' not in str(error.value) and files(ended) == before


@pytest.mark.full
def test_under_the_plateau_rule_the_evaluations_must_be_the_same(folder, tmp_path):
    with pytest.raises(Stopped):
        train(folder, tmp_path / 'run', {'epochs': 4.0}, stop_after='4')
    with pytest.raises(Stopped):
        train(folder, tmp_path / 'run', {'epochs': 4.0}, stop_after='2', eval_every=2.0)
    with pytest.raises(UserError, match='config.run.eval_every: 2.0 there, 1.0 here'):
        train(folder, tmp_path / 'run', PLATEAU)
    with pytest.raises(UserError, match='which decide under the plateau rule, were at other steps'):
        train(folder, tmp_path / 'run', PLATEAU, eval_every=2.0)
    assert [row['step'] for row in metrics.read(tmp_path / 'run') if row['kind'] == 'eval'] == [
        3,
        5,
    ]
