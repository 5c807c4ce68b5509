"""The list of measurements for a few minutes on a GPU."""

import argparse
import json
import sys

import pytest

from alexnet_jax.common.errors import UserError
from experiments import on_gpu
from experiments.on_gpu import Step
from tests.helpers.stores import write_store


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """call(STEP, ..., seconds=60) -> (how each ended so far, what was printed)."""

    def call(*steps, seconds=60):
        monkeypatch.setattr(on_gpu, 'steps', lambda args: [*steps])
        monkeypatch.setattr(sys, 'argv', ['on_gpu', f'--seconds={seconds}', f'--out={tmp_path}'])
        on_gpu.main()
        file = tmp_path / 'steps.json'
        record = json.loads(file.read_text()) if file.exists() else {}
        return {name: one['ended'] for name, one in record.items()}, capsys.readouterr().out

    return call


def python(name, script, seconds=30, **more):
    return Step(name, seconds, ['-c', script], **more)


def test_steps_end_and_are_not_repeated(call, tmp_path):
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    good, bad = (
        python('good', f'{count}; print("9 images/s")'),
        python('bad', 'raise SystemExit(3)'),
    )
    ended, out = call(good, bad)
    assert ended == {'good': 'finished', 'bad': 'failed (3)'}
    assert '9 images/s' in out and 'not finished: bad' in out
    call(good, bad)
    assert (tmp_path / 'count').read_text() == 'x'
    assert 'all finished' in call(good)[1]


def test_a_step_is_stopped_with_its_workers_and_resumed(call, tmp_path):
    script = f"""
import pathlib, subprocess, sys, time
there = pathlib.Path({str(tmp_path / 'slow' / 'there')!r})
if there.exists():
    sys.exit()
there.parent.mkdir(); there.touch()
subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])
"""
    one = python('slow', script, seconds=3)
    ended, out = call(one._replace(again=True), seconds=30)
    assert ended == {'slow': 'stopped'} and 'slow: stopped after 3 s' in out
    assert call(one)[0] == {'slow': 'stopped'}  # what was left of it is removed first
    assert call(one._replace(again=True))[0] == {'slow': 'finished'}


def test_no_step_starts_without_time(call):
    ended, out = call(python('late', 'pass'), seconds=1)
    assert ended == {} and 'late: left out, 1 s left' in out


def test_the_steps(tmp_path):
    """Those that need a store are left out without it; a rehearsal changes sizes only."""
    for name in ('raw', 'cifar'):
        write_store(tmp_path / name, format='u8', size=64, classes=3, counts={'train': 8, 'val': 4})

    def made(store='', cifar='', rehearse=False):
        args = argparse.Namespace(out=tmp_path, store=store, cifar=cifar, rehearse=rehearse)
        return {step.name: step.command for step in on_gpu.steps(args)}

    plain, every = made(rehearse=True), made(f'{tmp_path}/raw', f'{tmp_path}/cifar')
    assert [*plain][:2] == ['paper-512', 'paper-2048']
    assert {*every} - {*plain} == {'input-512', 'steps', 'steps-cpu', 'fig1', '18pct', '11pct'}
    assert '--config.augment.crop=56' in every['steps']
    assert '--batch=8' in plain['paper-512'] and '--batch=8' not in every['paper-512']


def test_no_time_at_all(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['on_gpu', '--seconds=0'])
    with pytest.raises(UserError, match='--seconds=0.0: must be above 0'):
        on_gpu.main()
