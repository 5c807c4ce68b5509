"""Tests the SLURM batch script: how it reacts to exit codes and signals, and what it passes on.

Small scripts stand in for SLURM's commands and for the tasks; nothing here imports JAX.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT


class Slurm:
    """The batch script with stand-ins for SLURM's commands; `srun` runs the given scripts in turn."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / 'log'
        for name in ('srun', 'scontrol', 'scancel', 'python'):
            self.command(name, f'echo {name} "$@" >> {self.log}')
        self.latest('-1')
        self.command('squeue', 'echo RUNNING')
        os.mkfifo(folder / 'fifo')
        self.environment = {
            'PATH': f'{folder}:/usr/bin:/bin',
            'PYTHON': f'{folder}/python',
            'SLURM_JOB_ID': '7',
        }

    def command(self, name: str, script: str) -> None:
        (self.folder / name).write_text(f'#!/bin/bash\n{script}\n')
        (self.folder / name).chmod(0o755)

    def latest(self, *steps: str) -> None:
        """Sets the steps of the latest checkpoint, for successive calls; the last one repeats."""
        self._in_turn('python', [f'echo {step}' for step in steps])

    def srun(self, *scripts: str) -> None:
        self._in_turn('srun', scripts)

    def _in_turn(self, name: str, scripts) -> None:
        for i, script in enumerate(scripts):
            self.command(f'{name}{i}', script)
        count, last = self.folder / f'{name}.count', len(scripts) - 1
        self.command(
            name,
            f"""echo {name} "$@" >> {self.log}
i=$(cat {count} 2> /dev/null || echo 0)
echo $((i < {last} ? i + 1 : {last})) > {count}
exec {self.folder}/{name}$i""",
        )

    def run(self, *arguments: str, cwd: Path = ROOT) -> tuple[int, list[str]]:
        """Runs the script -> (exit code, the SLURM commands it issued)."""
        done = subprocess.run(
            [
                'bash',
                ROOT / 'experiments/launch/slurm.sbatch',
                *(arguments or ('--config=configs/a.py', '--workdir=w')),
            ],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=30,
            env=self.environment,
        )
        assert not done.stderr, done.stderr
        lines = self.log.read_text().splitlines()
        return done.returncode, [line for line in lines if line.startswith('s')]


SRUN = (
    'srun --label --kill-on-bad-exit=0 --wait=90 {}/python -m alexnet_jax.main --distributed '
    '--config=configs/a.py --workdir=w'
)


@pytest.mark.parametrize(
    ('codes', 'steps', 'code', 'requeued'),
    [
        ([0], ['-1'], 0, False),
        ([2], ['-1'], 2, False),
        ([75], ['-1'], 75, True),
        ([76, 0], ['-1'], 0, False),
        ([137, 76], ['-1'], 1, False),  # twice without a new checkpoint
        ([76, 137, 76, 0], ['-1', '-1', '-1', '5', '5', '5', '5'], 0, False),
    ],
)
def test_the_batch_script_goes_by_the_code_of_srun(tmp_path, codes, steps, code, requeued):
    slurm = Slurm(tmp_path)
    slurm.srun(*(f'exit {code}' for code in codes))
    slurm.latest(*steps)
    starts = [SRUN.format(tmp_path)] * len(codes)
    assert slurm.run() == (code, starts + ['scontrol requeue 7'] * requeued)


@pytest.mark.parametrize('code', [75, 143])
def test_the_batch_script_passes_sigterm_on_and_requeues(tmp_path, code):
    slurm = Slurm(tmp_path)
    fifo = tmp_path / 'fifo'
    # As if SLURM had sent it; the tasks take a while to end.
    asked = f'kill -TERM $PPID; read < {fifo}; sleep 0.2; echo saved >> {slurm.log}; exit {code}'
    slurm.srun('exit 76', asked)
    slurm.command('scancel', f'echo scancel "$@" >> {slurm.log}; echo > {fifo}')
    srun = SRUN.format(tmp_path)
    assert slurm.run() == (
        75,
        [srun, srun, 'scancel --signal=TERM 7', 'saved', 'scontrol requeue 7'],
    )


@pytest.mark.parametrize('gpus', ['', '0,1'])
def test_tasks_without_gpus_have_the_settings_of_malloc(tmp_path, gpus):
    slurm = Slurm(tmp_path)
    slurm.srun(f'echo "settings: $GLIBC_TUNABLES" >> {slurm.log}')
    slurm.environment['SLURM_JOB_GPUS'] = gpus
    _, (_, line) = slurm.run()
    assert line.startswith('settings: glibc.malloc') == (not gpus)


def test_a_canceled_job_does_not_come_back(tmp_path):
    slurm = Slurm(tmp_path)
    slurm.srun('kill -TERM $PPID; exit 75')
    slurm.command('squeue', 'echo COMPLETING')
    assert slurm.run() == (75, [SRUN.format(tmp_path)])


@pytest.mark.parametrize(
    ('arguments', 'run'),
    [
        (['--config=configs/paper.py'], 'runs/paper'),
        (['--config', 'configs/paper.py:tanh', '--config.seed=1'], 'runs/paper-tanh'),
        (['--workdir=a/b', '--config=configs/paper.py'], 'a/b'),
    ],
)
def test_the_batch_script_finds_the_checkpoints(tmp_path, arguments, run):
    """The second and fourth of six starts save one; the last two make it give up."""
    slurm = Slurm(tmp_path)
    slurm.command('python', f'PYTHONPATH={ROOT} exec {sys.executable} "$@"')
    save = f'mkdir -p {tmp_path / run}/checkpoints; cd {tmp_path / run}/checkpoints; mkdir'
    slurm.srun(
        'exit 76',
        f'{save} 5 notes; exit 76',
        'exit 76',
        f'{save} 20; exit 76',
        f'{save} 25.orbax-checkpoint-tmp; exit 76',
        'exit 76',
    )
    code, commands = slurm.run(*arguments, cwd=tmp_path)
    assert (code, len(commands)) == (1, 6)
