"""JAX's devices: settings that name missing devices."""

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from alexnet_jax.common.errors import UserError
from alexnet_jax.devices import mesh
from tests.helpers import ROOT


@pytest.mark.parametrize('named', ['cuda', 'tpu', 'nonsense', 'cpu,cuda', 'gpu'])
def test_devices_that_are_not_there(monkeypatch, named):
    before = jax.config.jax_platforms
    jax.config.update('jax_platforms', named)
    try:
        with pytest.raises(
            UserError, match=rf'JAX_PLATFORMS={named}: .*unset it .* \(cpu\)'
        ) as error:
            mesh.make((0, 0), towers=1, batches={})
        assert '\n' not in str(error.value)
    finally:
        jax.config.update('jax_platforms', before)


@pytest.mark.slow
@pytest.mark.parametrize('command', ['main --config=quickstart', 'visualize RUN'])
def test_commands_where_devices_are_not_there(tmp_path, command):
    done = subprocess.run(
        [sys.executable, '-m', *f'alexnet_jax.{command}'.split()],
        cwd=tmp_path,
        env=os.environ | {'JAX_PLATFORMS': 'cpu,nonsense', 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith('error: JAX_PLATFORMS=cpu,nonsense: ')
    assert done.stderr.count('\n') == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize('count', [0, -7])
def test_an_impossible_number_of_devices(monkeypatch, count):
    monkeypatch.setattr(
        jax, 'config', SimpleNamespace(jax_num_cpu_devices=count, update=lambda *args: None)
    )
    with pytest.raises(UserError, match=f'JAX_NUM_CPU_DEVICES={count}: must be at least 1'):
        mesh.configure()


def test_a_plugin_that_fails_takes_one_line(caplog):
    mesh.start_devices()
    try:
        raise OSError('libcudart.so: cannot open\nshared object file')
    except OSError:
        logging.getLogger('jax._src.xla_bridge').exception('plugin %s', 'cuda')
    assert caplog.messages == ['plugin cuda: OSError: libcudart.so: cannot open shared object file']
    assert not caplog.records[0].exc_info


def test_every_process_needs_a_device(monkeypatch):
    monkeypatch.setattr(jax, 'process_count', lambda: 3)
    with pytest.raises(UserError, match='leaves 2 of 3 processes without a device; start only 1'):
        mesh.make((0, 0), towers=1, batches={'--batch': 8})


def test_idle_devices_are_named():
    count = jax.device_count()
    made = mesh.make((0, 0), towers=1, batches={'--batch': 1})
    assert mesh.describe(made).endswith(f'each device; {count - 1} of {count} devices idle')
    whole = mesh.make((0, 0), towers=1, batches={'--batch': count})
    assert 'idle' not in mesh.describe(whole)
