"""Requests to stop: after steps, after a time, by signals."""

import signal
import subprocess
import sys

import pytest

from alexnet_jax.common.errors import UserError
from alexnet_jax.devices import preemption
from tests.helpers import ROOT


@pytest.mark.parametrize(
    ('given', 'expected'),
    [
        ('', (None, None)),
        ('100', (100, None)),
        ('90s', (None, 90)),
        ('45m', (None, 2700)),
        ('23h', (None, 82800)),
        ('2d', (None, 172800)),
    ],
)
def test_stop_after(given, expected):
    assert preemption.parse(given) == expected


@pytest.mark.parametrize('given', ['0', '0h', '-1', '1.5h', 'h', '23 h', '23H', 'soon'])
def test_what_is_neither_steps_nor_a_time(given):
    with pytest.raises(UserError, match='config.run.stop_after'):
        preemption.parse(given)


def test_after_steps_counted_from_the_start():
    with preemption.watch('3', 10) as stop:
        assert [bool(stop(step)) for step in (10, 11, 12, 13)] == [False, False, False, True]


def test_after_a_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(preemption.time, 'monotonic', lambda: now[0])
    with preemption.watch('45m', 0) as stop:
        now[0] = 2699.0
        assert not stop(5)
        now[0] = 2700.0
        assert stop(6) == 'stop_after=45m'


@pytest.mark.parametrize(
    ('number', 'name'), [(signal.SIGTERM, 'SIGTERM'), (signal.SIGINT, 'Ctrl-C')]
)
def test_signals(number, name):
    before = signal.getsignal(number)
    with preemption.watch('', 0) as stop:
        assert not stop(0)
        signal.raise_signal(number)
        assert stop(1) == name
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), preemption.watch('', 0):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_an_interrupted_command_does_not_wait_for_its_threads():
    script = (
        'import threading, time\n'
        'from alexnet_jax import command\n'
        'def main():\n'
        '    threading.Thread(target=time.sleep, args=(60,)).start()\n'
        '    raise KeyboardInterrupt\n'
        'command.run(main)'
    )
    line = [sys.executable, '-c', script]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (130, '', 'interrupted\n')
