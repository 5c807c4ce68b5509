"""From ImageNet's two tars to ten-crop errors, through the real TFDS builder and commands."""

import json
import os
import subprocess
import sys

import pytest

from alexnet_jax.rundir import metrics
from tests.helpers import ROOT
from tests.helpers.fixtures import write_imagenet_tars

VAL = 10


def command(module, *arguments, folder, code=0):
    done = subprocess.run(
        [sys.executable, '-m', f'alexnet_jax.{module}', *arguments],
        cwd=folder,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout


@pytest.mark.full
def test_paper_from_the_tars_to_ten_crops(tmp_path):
    """Miniature tars, including a CMYK and a PNG file; `configs/paper.py` at full width."""
    (tmp_path / 'tars').mkdir()
    made = write_imagenet_tars(tmp_path / 'tars', per_class=4, val=VAL)
    command('prepare', '--source=imagenet2012', f'--dir={tmp_path / "tars"}', folder=tmp_path)
    store = json.loads((tmp_path / 'data/imagenet2012-256-jpg/store.json').read_text())
    assert store['classes'] == 1000
    assert store['counts'] == {split: len(names) for split, names in made.items()}
    printed = command(
        'main',
        f'--config={ROOT}/configs/paper.py',
        '--cpu_devices=2',
        f'--config.data.dir={tmp_path / "tars"}',
        '--config.train.batch=8',
        '--config.run.eval_batch=8',
        '--config.run.log_every=1',
        '--config.run.stop_after=10',
        '--config.run.eval_every=1e9',
        folder=tmp_path,
        code=75,  # stopped before the end
    )
    assert 'Total: 60,965,224' in printed
    assert 'each tower on its own device' in printed
    rows = [row for row in metrics.read(tmp_path / 'runs/paper') if row['kind'] == 'train']
    assert [row['step'] for row in rows] == [*range(10)]
    assert all(0 < row['loss'] < 20 for row in rows)
    printed = command(
        'evaluate', 'runs/paper', '--step=latest', '--batch=4', '--cpu_devices=2', folder=tmp_path
    )
    lines = printed.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == [str(VAL)] * 2  # 1 crop, 10 crops
    assert all('(step 10)' in line for line in lines[1:])
