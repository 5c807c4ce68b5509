"""The list of measurements for a few minutes on a GPU."""

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alexnet_jax.common.errors import UserError
from experiments import on_gpu
from experiments.on_gpu import Step
from tests.helpers import ROOT
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


def test_other_arguments_are_another_run(call, tmp_path):
    """A rehearsal does not count as the real run, nor is it lost by mistake."""
    call(python('one', 'print(1)'))
    before = (tmp_path / 'steps.json').read_text(), (tmp_path / 'one.log').read_text()
    with pytest.raises(UserError, match='one ran with different arguments; give another folder'):
        call(python('one', 'print(2)'))
    assert ((tmp_path / 'steps.json').read_text(), (tmp_path / 'one.log').read_text()) == before
    call(python('failed', 'raise SystemExit(3)'))
    assert call(python('failed', ''))[0]['failed'] == 'finished'  # fixed


@pytest.mark.parametrize('text', ['{', '[]', '{"one": 1}', '{"one": {"ended": "finished"}}'])
def test_a_damaged_record(call, tmp_path, text):
    (tmp_path / 'steps.json').write_text(text)
    with pytest.raises(UserError, match='steps.json: cannot be read .*; remove it'):
        call(python('one', ''))
    assert not (tmp_path / 'one.log').exists()


@pytest.mark.parametrize(
    ('number', 'code'), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)]
)
def test_an_interrupted_command_leaves_nothing_running(tmp_path, number, code):
    """Both the step and its worker end, even if they ignore SIGTERM."""
    worker = 'import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); '
    worker += f"open({str(tmp_path / 'there')!r}, 'w').write(f'{{os.getpid()}}\\n'); time.sleep(60)"
    step = f'import subprocess, sys; subprocess.run([sys.executable, "-c", {worker!r}])'
    script = f"""
import sys
from alexnet_jax.command import run
from experiments import on_gpu
sys.argv = ['on_gpu', '--out={tmp_path}/out']
on_gpu.steps = lambda args: [on_gpu.Step('slow', 60, ['-c', {step!r}])]
run(on_gpu.main)
"""
    process = subprocess.Popen([sys.executable, '-c', script], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        there = tmp_path / 'there'
        wait_for(lambda: there.exists() and there.read_text().endswith('\n'))
        (leader,) = children(process.pid)
        assert runs(leader) and runs(int(there.read_text()))
        process.send_signal(number)
        assert process.wait(30) == code
        wait_for(lambda: not runs(leader) and not runs(int(there.read_text())), 10)
    finally:
        process.kill()


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def runs(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    return False


def children(pid):
    return [int(n) for n in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


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
    assert ended == {} and 'late: skipped, 1 s left' in out


def test_the_steps(tmp_path):
    """Those that need a store are left out without it; a rehearsal changes sizes only."""
    for name, size in (('raw', 64), ('cifar', 32)):
        counts = {'train': 20, 'val': 10}
        write_store(tmp_path / name, format='u8', size=size, classes=10, counts=counts)

    seconds = {}

    def made(store='', cifar='', rehearse=False):
        args = argparse.Namespace(out=tmp_path, store=store, cifar=cifar, rehearse=rehearse)
        seconds.update({step.name: step.seconds for step in on_gpu.steps(args)})
        return {step.name: step.command for step in on_gpu.steps(args)}

    plain, every = made(rehearse=True), made(f'{tmp_path}/raw', f'{tmp_path}/cifar')
    assert [*plain][:2] == ['paper-512', 'paper-2048']
    assert {*every} - {*plain} == {'input-512', 'steps', 'fig1', '18pct', '11pct'}
    assert '--config.augment.crop=56' in every['steps']
    assert '--batch=8' in plain['paper-512'] and '--batch=8' not in every['paper-512']
    times = [seconds[name] for name in every if name not in ('fig1', '18pct', '11pct')]
    assert sum(times[:5]) <= 400 and sum(times) <= 650
    with pytest.raises(UserError, match='--cifar=.*raw: must be a store of CIFAR-10'):
        made(cifar=f'{tmp_path}/raw')


@pytest.mark.parametrize('flag', ['--cifar', '--store', '--reference'])
def test_what_is_missing_is_seen_first(monkeypatch, tmp_path, flag):
    out = tmp_path / 'out'
    monkeypatch.setattr(sys, 'argv', ['on_gpu', f'--out={out}', f'{flag}={tmp_path}/none'])
    with pytest.raises(UserError, match='/none'):
        on_gpu.main()
    assert not out.exists()


def test_losses_beside_those_of_another_run(tmp_path, monkeypatch, capsys):
    for name, loss in (('steps', 2.5), ('cpu', 2.25)):
        (tmp_path / name).mkdir()
        row = {'kind': 'train', 'step': 20, 'loss': loss}
        (tmp_path / name / 'metrics.jsonl').write_text(json.dumps(row) + '\n')
    monkeypatch.setattr(on_gpu, 'steps', lambda args: [])
    monkeypatch.setattr(sys, 'argv', ['on_gpu', f'--out={tmp_path}', f'--reference={tmp_path}/cpu'])
    on_gpu.main()
    assert 'by step: 20: 2.5000 2.2500; largest difference 0.25' in capsys.readouterr().out


def test_no_time_at_all(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['on_gpu', '--seconds=0'])
    with pytest.raises(UserError, match='--seconds=0.0: must be above 0'):
        on_gpu.main()
