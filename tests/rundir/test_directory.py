"""Run directories: one start at a time, and the record of each."""

import io
import json
import os
import platform
import subprocess
import sys

import numpy as np
import pytest

from alexnet_jax.common.errors import UserError
from alexnet_jax.common.paths import Path
from alexnet_jax.devices import cpu
from alexnet_jax.rundir import directory
from configs import original, paper

HOLDER = """
import pathlib, sys, time
from alexnet_jax.common.paths import Path
from alexnet_jax.devices import cpu
from alexnet_jax.rundir import directory
with directory.locked(pathlib.Path(sys.argv[1])):
    print('held', flush=True)
    time.sleep(600)
"""


def test_one_start_at_a_time(tmp_path):
    """A second start is refused while the first lives, and allowed once that is killed."""
    holder = subprocess.Popen(
        [sys.executable, '-c', HOLDER, str(tmp_path / 'run')], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == 'held\n'
        with pytest.raises(UserError, match='another process is training here'):
            with directory.locked(tmp_path / 'run'):
                pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with directory.locked(tmp_path / 'run'):
        pass
    with directory.locked(tmp_path / 'run'):
        assert not list((tmp_path / 'run').iterdir())


@pytest.mark.parametrize('name', ['link', 'link/run', 'link/a/run'])
def test_a_link_to_nothing(tmp_path, name):
    (tmp_path / 'link').symlink_to(tmp_path / 'gone')
    with pytest.raises(
        UserError, match='--workdir=.*link is a link to .*gone, which does not exist'
    ):
        directory.check(paper.get_config(), Path(tmp_path / name))


@pytest.mark.skipif(not os.path.isdir('/proc'), reason='needs Linux')
def test_a_folder_in_which_nothing_can_be_made(tmp_path):
    """Even as root, despite the permissions."""
    with pytest.raises(UserError, match='--workdir=/proc/run: /proc is not a writable folder'):
        directory.check(paper.get_config(), Path('/proc/run'))


def test_a_mean_that_is_not_finite(tmp_path):
    (tmp_path / 'names.txt').write_text('a\n')
    np.savez(tmp_path / 'stats.npz', mean=np.full((2, 2, 3), np.nan, np.float32))
    with pytest.raises(UserError, match='incomplete run directory: the mean in stats.npz'):
        directory.read_facts(tmp_path)


def test_a_commit_where_git_is(monkeypatch):
    described = subprocess.run(
        ['git', 'describe', '--always'], capture_output=True, text=True, check=False
    )
    assert directory.commit().removesuffix('-dirty') == (described.stdout.strip() or 'unknown')
    monkeypatch.setenv('PATH', '/nowhere')
    assert directory.commit() == 'unknown'


def test_a_commit_is_dirty_where_code_was_changed(tmp_path, monkeypatch):
    code = ['alexnet_jax/a.py', 'configs/b.py', 'experiments/c.py', 'experiments/d/e.py']
    written = [
        'experiments/results/c.json',
        'experiments/figures/c.png',
        'experiments/LOG.md',
        'README.md',
    ]
    for file in [tmp_path / name for name in code + written]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('as committed')
    for words in ('init', 'add .', '-c user.name=a -c user.email=a commit -m first'):
        subprocess.run(['git', *words.split()], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setattr(directory, '__file__', str(tmp_path / code[0]))
    clean = directory.commit()
    assert clean != 'unknown'
    for name in written:
        (tmp_path / name).write_text('changed')
    (tmp_path / 'experiments/results/new.json').touch()
    (tmp_path / code[1]).write_text('as committed')  # rewritten, not changed
    assert directory.commit() == clean
    for name in code:
        (tmp_path / name).write_text('changed')
        assert directory.commit() == f'{clean}-dirty'
        (tmp_path / name).write_text('as committed')
    assert directory.commit() == clean
    (tmp_path / 'experiments/new.py').touch()
    assert directory.commit() == f'{clean}-dirty'


def test_the_processor_and_its_cores(monkeypatch):
    monkeypatch.setattr(directory.os, 'sched_getaffinity', lambda process: {3}, raising=False)
    told = lambda path: io.StringIO(f'processor\t: 0\nmodel name\t: {path}: 9\n')  # noqa: E731
    monkeypatch.setattr(cpu, 'open', told, raising=False)
    assert directory.processor() == '/proc/cpuinfo: 9 (1 core)'
    monkeypatch.setattr(cpu, 'open', lambda path: io.StringIO('CPU part\t: 0xd0c\n'))
    monkeypatch.setattr(platform, 'processor', lambda: '')
    monkeypatch.setattr(platform, 'machine', lambda: 'aarch64')
    assert directory.processor() == 'aarch64 (1 core)'


def test_a_damaged_run_json_is_named(tmp_path):
    (tmp_path / 'run.json').write_text(json.dumps([])[:1])
    with pytest.raises(UserError, match='run.json: not JSON'):
        directory.write(None, tmp_path, None)


def test_a_run_made_before_some_fields_were_there_goes_on(tmp_path):
    config = original.get_config()
    there = json.loads(json.dumps(config.to_dict()))
    for part, later in directory.LATER.items():
        for field in later:
            del there[part][field]
    (tmp_path / 'config.json').write_text(json.dumps(there))
    directory.check(config, tmp_path)
    assert directory.read_config(tmp_path)['model']['net'] == 'alexnet'
    config.optim.name = 'lars'
    with pytest.raises(UserError, match="config.optim.name: 'sgd' there, 'lars' here"):
        directory.check(config, tmp_path)


@pytest.mark.parametrize(('preset', 'refused'), [(paper, True), (original, False)])
def test_under_the_plateau_rule_the_evaluations_decide(tmp_path, preset, refused):
    """Under it, `eval_every` cannot change between starts; under other schedules it can."""
    config = preset.get_config()
    (tmp_path / 'config.json').write_text(json.dumps(config.to_dict()))
    config.run.eval_every = 2.0
    if refused:
        with pytest.raises(UserError, match='config.run.eval_every: 1.0 there, 2.0 here'):
            directory.check(config, Path(tmp_path))
    else:
        directory.check(config, Path(tmp_path))
