"""JAX settings in a user's environment or program neither change a run nor make it fail."""

import jax
import numpy as np
import pytest

import alexnet_jax
from alexnet_jax.common.errors import UserError
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.training import evaluation, loop
from tests.helpers.commands import assert_same, outcome
from tests.helpers.stores import write_store
from tests.training.test_contract import SIZE, build, make_config

OTHERS = {
    'jax_enable_x64': True,
    'jax_default_prng_impl': 'rbg',
    'jax_threefry_partitionable': False,
    'jax_debug_key_reuse': True,
    'jax_numpy_dtype_promotion': 'strict',
    'jax_transfer_guard': 'disallow',
    'jax_disable_jit': True,
    'jax_debug_nans': True,
    'jax_enable_custom_prng': True,
    'jax_legacy_prng_key': 'error',
}


@pytest.fixture
def setting(request):
    name, value = request.param
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    yield name
    jax.config.update(name, before)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('settings')
    write_store(
        folder / 'three', format='u8', size=SIZE, classes=3, counts={'train': 20, 'val': 11}
    )
    train(folder, 'alone')
    return folder


def train(folder, name, **changes):
    loop.train(
        make_config(folder, 'nested', **{'optim.epochs': 0.8, **changes}), folder / name, build
    )


def classify(folder):
    images = np.random.default_rng(0).integers(256, size=(2, 30, 40, 3), dtype=np.uint8)
    return alexnet_jax.load(folder / 'alone', build=build)(images)


@pytest.fixture(scope='module')
def expected(folder):
    return classify(folder), evaluation.compare([folder / 'alone'], build=build)


@pytest.mark.slow
@pytest.mark.parametrize('setting', OTHERS.items(), ids=str, indirect=True)
def test_a_program_with_other_settings(folder, expected, setting):
    """It keeps them, and training, evaluation and `load` in it give the same bits."""
    set_to = getattr(jax.config, setting)
    train(folder, setting)
    assert_same(outcome(folder / setting), outcome(folder / 'alone'))
    assert classify(folder).tobytes() == expected[0].tobytes()
    found = evaluation.compare([folder / 'alone'], build=build)
    assert [*map(str, found.values())] == [*map(str, expected[1].values())]
    assert getattr(jax.config, setting) == set_to


@pytest.mark.parametrize('setting', [('jax_random_seed_offset', 3)], ids=str, indirect=True)
def test_an_offset_of_all_seeds_is_refused(folder, setting):
    with pytest.raises(UserError, match='JAX_RANDOM_SEED_OFFSET=3: would change all draws'):
        train(folder, 'offset')
    assert not (folder / 'offset').exists()


@pytest.mark.parametrize(
    'setting',
    [*list(OTHERS.items())[:7], ('jax_random_seed_offset', 3)],
    ids=str,
    indirect=True,
)
def test_commands_override_settings(setting, monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '')
    before = getattr(jax.config, setting)
    meshes.configure()
    assert getattr(jax.config, setting) != before
