"""Configs that are refused: every field with hostile values, and what would not fit in memory."""

import functools
import itertools
import math

import pytest

from alexnet_jax.common import configfile, paths
from alexnet_jax.common.errors import UserError
from alexnet_jax.nets import network
from alexnet_jax.nets.build import build
from alexnet_jax.training import checks
from configs import quickstart

FIELDS = configfile.fields(quickstart.get_config())
# By the type of a field: what it refuses in any case, and what it may accept.
REFUSED = {
    int: (-1, 2**32, 10**30),
    float: (-1.0, -1e-9, math.nan, math.inf, 1e300),
    tuple: (
        (math.nan,),
        (math.inf, 1.0),
        ((1.0, math.nan),),
        (-1,),
        (2**32, 0),
        (None,),
        (-1,) * 1000,
    ),
}
TRIED = {
    int: (0, 1, 2**31, 2**32 - 1),
    float: (0.0, 1e-30, 1.0, 1e38),
    str: ('', 'x', '-1', '9' * 5000),
    bool: (True, False),
    tuple: (
        (),
        (0,),
        (1,) * 1000,
        ('x',),
        ((1, 2),),
        (('fc8', -1.0),),
        ((1.0, -1.0),),
        (2**31, 2**31),
    ),
}


@pytest.fixture(autouse=True)
def shapes_once(monkeypatch):
    """Most cases have the same network."""
    monkeypatch.setattr(network, 'shapes', functools.cache(network.shapes))


def check(changes, workdir):
    config = quickstart.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    return checks.check(config, paths.path(workdir), build)


@pytest.mark.parametrize('kind', [int, float, str, bool, tuple])
def test_every_field_with_hostile_values(tmp_path, kind):
    """Each is refused in one line or accepted immediately: no other exception, no large array."""
    fields = [name for name, value in FIELDS.items() if type(value) is kind]
    for name, value in itertools.product(fields, (*REFUSED.get(kind, ()), *TRIED[kind])):
        try:
            check({name.removeprefix('config.'): value}, tmp_path / 'run')
        except UserError as error:
            assert '\n' not in str(error), (name, value, error)
            assert 'config.' in str(error) or name == 'config.train.init_from', (name, value, error)
        else:
            assert value in TRIED[kind], (name, value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('model.width', 1e9, 'parameters and batches .* need at least .* GB, and there are .* GB'),
        ('model.hidden', (2**31, 2**31), 'need at least'),
        ('train.batch', 2**30, 'need at least .* reduce .* config.train.batch'),
        ('augment.jitter', 1.5, 'config.augment.jitter=1.5: must be at most 1'),
        ('train.recompute', 100, 'recompute=100: this network has no batch normalization'),
        ('model.width', -1.0, 'config.model.width=-1.0: must not be negative'),
        ('model.width', 0.0, 'config.model.*width=0.0'),
        ('model.width', None, 'config.model.width=None: must be of type float'),
        ('model.std', ('x',) * 8, 'config.model.std=.*: must be of type tuple.float'),
        ('model.norm_n', 2**31 + 1, 'norm_n=2147483649: .* at most twice the 96 kernels'),
        ('model.conv1_padding', (0, 11), 'conv1_padding=.*: must be below 11'),
        ('optim.epochs', 0.0, 'config.optim.epochs=0.0: must be above 0'),
        (
            'optim.warmup',
            200.0,
            'optim.warmup=200.0: must be below config.optim.epochs=36',
        ),
        ('optim.momentum', 1.0, 'momentum=1.0: must be at least 0 and below 1'),
        ('optim.momentum', 2.0, 'momentum=2.0: must be at least 0 and below 1'),
        ('optim.factor', 0.0, 'factor=0.0: must be above 0 and at most 1'),
        ('optim.factor', 2.0, 'factor=2.0: must be above 0 and at most 1'),
        ('optim.rate', math.nan, 'config.optim.rate=nan: must be finite'),
        ('optim.conv1', ((1.0, math.nan),), 'config.optim.conv1=.*: must be finite'),
        (
            'optim.decays',
            (('fc8', -1.0),),
            'config.optim.decays=.* pairs of a layer and a weight decay',
        ),
        ('optim.drops', (-1.0,), 'config.optim.drops: must not have negative numbers'),
        ('run.threads', 100_000, r'config.run.threads=100000: must be 0 \(one per core\) to 1000'),
        ('run.profile', (5, 1), 'config.run.profile'),
        ('run.stop_after', '9' * 5000, 'config.run.stop_after'),
    ],
)
def test_values_out_of_range(tmp_path, field, value, message):
    with pytest.raises(UserError, match=message) as error:
        check({field: value}, tmp_path / 'run')
    assert '\n' not in str(error.value)


def test_a_wrong_value_is_named_before_a_difference_from_the_run_there(tmp_path):
    (tmp_path / 'config.json').write_text(quickstart.get_config().to_json())
    with pytest.raises(UserError, match='holds a run with a different config'):
        check({'seed': 5}, tmp_path)
    with pytest.raises(UserError, match='^config.optim.rate=-1.0: '):
        check({'seed': 5, 'optim.rate': -1.0}, tmp_path)
