"""The allocator's settings: when they are wanted, that a command restarts once, and that they work."""

import subprocess
import sys

import pytest

from alexnet_jax.devices import allocator


@pytest.fixture
def linux(monkeypatch):
    """A machine where the settings are wanted, whatever this one is."""
    monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
    monkeypatch.setattr(allocator.platform, 'libc_ver', lambda: ('glibc', '2.36'))
    monkeypatch.setattr(allocator, 'ACCELERATORS', ())


def test_settings(linux, monkeypatch, tmp_path):
    assert allocator.settings() == {'GLIBC_TUNABLES': allocator.TUNABLES}
    monkeypatch.setattr(allocator, 'ACCELERATORS', (str(tmp_path),))
    assert allocator.settings() == {}


@pytest.mark.parametrize('library', [('glibc', '2.34'), ('', ''), ('musl', '1.2')])
def test_other_c_libraries(linux, monkeypatch, library):
    monkeypatch.setattr(allocator.platform, 'libc_ver', lambda: library)
    assert allocator.settings() == {}


def test_the_settings_of_the_user_stay(linux, monkeypatch):
    monkeypatch.setenv('GLIBC_TUNABLES', 'glibc.malloc.check=3')
    assert allocator.settings() == {}


RESTARTED = """
import os, sys
from alexnet_jax.devices import allocator
allocator.settings = lambda: {} if 'GLIBC_TUNABLES' in os.environ else {'GLIBC_TUNABLES': 'a=1'}
print('start', os.getpid(), sys.argv[1:])
allocator.keep_memory()
print('end', os.getpid(), sys.argv[1:], os.environ['GLIBC_TUNABLES'])
"""


def test_a_command_starts_again_once_in_its_own_place(monkeypatch):
    monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
    process = subprocess.Popen(
        [sys.executable, '-c', RESTARTED, 'two words', '--x=1'], stdout=subprocess.PIPE, text=True
    )
    lines = process.communicate(timeout=60)[0].splitlines()
    start = f"start {process.pid} ['two words', '--x=1']"
    assert lines == [start, start, f"end {process.pid} ['two words', '--x=1'] a=1"]


FAULTS = """
import resource, threading
def work():
    for i in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        b'x' * 2**27
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(faults)
thread = threading.Thread(target=work)  # as XLA's programs run on threads of their own
thread.start()
thread.join()
"""


@pytest.mark.skipif(not allocator.platform.libc_ver()[0] == 'glibc', reason='no glibc')
def test_memory_is_kept(linux, monkeypatch):
    """128 MiB written: 32,768 pages of 4 KiB, faulted in again each time without the settings."""
    faults = []
    for environment in ({}, allocator.settings()):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        done = subprocess.run(
            [sys.executable, '-c', FAULTS], capture_output=True, text=True, check=True
        )
        faults.append(int(done.stdout))
    assert faults[1] < 1000 < 30_000 < faults[0], faults
