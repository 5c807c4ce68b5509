"""The launchers: what they do when processes end, by whatever code; and what they pass on.

Small scripts stand in for the processes of a run; nothing here imports JAX.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.launch import local
from tests.helpers import ROOT

HANG = 'import signal; signal.alarm(20); signal.pause()'  # a broken launcher leaves nothing
KILL = 'import os; os.kill(os.getpid(), 9)'  # as if the system had run out of memory
GRACE = 0.2


def ends(code: int) -> str:
    return f'raise SystemExit({code})'


def python(script: str) -> list[str]:
    return [sys.executable, '-S', '-c', script]


def supervise(starts: list[list[str]], **options) -> int:
    """The launcher's code for these scripts, of which every start must be needed."""
    rest = iter(starts)
    options = {'latest': lambda: -1, 'grace': GRACE, **options}
    code = local.supervise(lambda: [python(script) for script in next(rest)], **options)
    assert list(rest) == [], 'fewer starts than expected'
    return code


@pytest.mark.parametrize(
    ('codes', 'asked', 'code'),
    [
        ([0, 0], 0, 0),
        ([75, 75], 0, 75),  # run.stop_after, or a signal to one of them
        ([75, 75], 1, 75),
        ([0, 0], 1, 0),  # it was over anyway
        ([-15, 75], 1, 75),  # one had only just started
        ([-15, 76], 0, None),
        ([2, 2], 0, 2),
        ([2, -9], 0, 2),
        ([76, 2], 0, None),  # the first one is the cause
        ([1, 76], 0, None),
        ([-9, 76], 0, None),
        ([75, 76], 0, None),
        ([-9, 76], 1, 76),
        ([76, 1], 1, 1),
        ([-9, -9], 2, 130),
    ],
)
def test_the_code_that_follows_from_those_of_the_processes(codes, asked, code):
    assert local.exit_code(codes, asked) == code


def test_nothing_is_started_again_when_all_are_done():
    assert supervise([[ends(0), ends(0)]]) == 0


def test_a_mistake_of_the_user_stops_all_and_is_not_tried_again(capsys):
    assert supervise([[ends(2), HANG]]) == 2
    assert 'killing the processes that have not ended' in capsys.readouterr().out


def test_when_one_is_lost_all_start_again(capsys):
    assert supervise([[HANG, KILL], [ends(0), ends(0)]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        'launch: process 1 ended with SIGKILL; the others have 0.2 s to end',
        'launch: killing the processes that have not ended',
        'launch: process 0 ended with SIGKILL',
        'launch: starting all again (1 of 3)',
    ]


def test_twice_without_a_new_checkpoint_is_enough(capsys):
    assert supervise([[ends(1), ends(76)], [ends(1), ends(76)]], restarts=9) == 1
    assert 'lost 2 times in a row without a new checkpoint' in capsys.readouterr().out


def test_with_new_checkpoints_it_goes_on_until_the_restarts_are_used_up(capsys):
    steps = iter([-1, 5, 5, 5, 5, 9])  # before and after each start: the second one made none
    starts = [[ends(76)]] * 3
    assert supervise(starts, restarts=2, latest=lambda: next(steps)) == 1
    assert 'the last of --restarts=2' in capsys.readouterr().out


def test_lines_say_which_process_and_a_hidden_one_is_shown_when_it_fails(capsys, monkeypatch):
    monkeypatch.delenv('PYTHONUNBUFFERED', raising=False)
    fails = 'print("why"); raise SystemExit(2)'
    hangs = 'print("a\\nb"); ' + HANG  # must not wait in its buffer
    assert supervise([[hangs, fails, fails.replace('why', 'not this')]], grace=3) == 2
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith('[0]')] == ['[0] a', '[0] b']
    assert ('[1] why\n' in out) != ('[2] not this\n' in out)  # of the first one that failed


def test_all_lines_are_shown_when_wanted(capsys):
    assert supervise([[ends(0), 'print("a")']], show_all=True) == 0
    assert capsys.readouterr().out == '[1] a\n'


STAND_IN = """
import signal, sys, time

def stop(number, frame):
    print('got', signal.Signals(number).name, flush=True)
    if 'stubborn' not in sys.argv:
        sys.exit(75)

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
signal.alarm(20)
print('ready', flush=True)
while True:
    time.sleep(0.05)  # pause() would miss a signal that comes just before it
"""


class Launcher:
    """The real command, in a session of its own as in a terminal, with the stand-in as its program."""

    def __init__(self, folder: Path, *arguments: str):
        (folder / 'stand_in.py').write_text(STAND_IN)
        self.process = subprocess.Popen(
            [
                sys.executable,
                '-m',
                'experiments.launch.local',
                '--processes=2',
                '--all',
                '--module=stand_in',
                '--',
                *arguments,
            ],
            cwd=ROOT,
            env={**os.environ, 'PYTHONPATH': str(folder)},
            start_new_session=True,
            stdout=subprocess.PIPE,
            text=True,
        )

    def until_both(self, text: str) -> None:
        wanted = {f'[0] {text}\n', f'[1] {text}\n'}
        while wanted:
            line = self.process.stdout.readline()
            assert line, f'ended before {wanted}'
            wanted -= {line}

    def end(self) -> tuple[int, list[str]]:
        out, _ = self.process.communicate(timeout=30)
        return self.process.returncode, out.splitlines()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_once(tmp_path, number):
    launcher = Launcher(tmp_path)
    launcher.until_both('ready')
    os.killpg(launcher.process.pid, number)  # a terminal sends it to its whole group
    code, lines = launcher.end()
    assert code == 75
    assert sorted(lines) == [
        '[0] got SIGTERM',
        '[1] got SIGTERM',
        f'launch: {number.name}: the processes are asked to stop',
    ]


def test_the_second_ctrl_c_kills(tmp_path):
    launcher = Launcher(tmp_path, 'stubborn')
    launcher.until_both('ready')
    launcher.process.send_signal(signal.SIGINT)
    launcher.until_both('got SIGTERM')
    launcher.process.send_signal(signal.SIGINT)
    code, lines = launcher.end()
    assert (code, lines) == (130, ['launch: SIGINT: killing'])


def test_the_command_that_every_process_gets(monkeypatch):
    given = {}
    ports = iter([7001, 7002])
    monkeypatch.setattr(local, 'free_port', lambda: next(ports))
    monkeypatch.setattr(
        local, 'supervise', lambda commands, **options: given.update(options, c=commands)
    )
    arguments = [
        '--processes=2',
        '--cpu_devices=3',
        '--restarts=5',
        '--',
        '--config=configs/a.py:b',
    ]
    monkeypatch.setattr(sys, 'argv', ['local', *arguments])
    with pytest.raises(SystemExit):
        local.main()
    assert given['c']() == [
        [
            sys.executable,
            '-m',
            'alexnet_jax.main',
            '--config=configs/a.py:b',
            '--cpu_devices=3',
            '--coordinator=localhost:7001',
            '--num_processes=2',
            f'--process_id={i}',
        ]
        for i in range(2)
    ]
    assert '--coordinator=localhost:7002' in given['c']()[1]  # a new port at every start
    assert given['restarts'] == 5


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--processes=2', '--config=configs/a.py'], '--config=configs/a.py'),
        (['--processes=2'], '`--` is missing'),
        (['--processes=0', '--', '--config=a.py'], '--processes=0'),
        (['--processes=1', '--restarts=-1', '--', '--config=a.py'], '--restarts=-1'),
    ],
)
def test_wrong_arguments_are_one_line(monkeypatch, arguments, words):
    monkeypatch.setattr(sys, 'argv', ['local', *arguments])
    with pytest.raises(local.UserError) as error:
        local.main()
    assert words in str(error.value) and '\n' not in str(error.value)


def test_where_the_checkpoints_are(tmp_path):
    assert local.run_directory(['--config=configs/paper.py']) == 'runs/paper'
    assert (
        local.run_directory(['--config', 'configs/paper.py:tanh', '--config.seed=1'])
        == 'runs/paper-tanh'
    )
    assert local.run_directory(['--workdir=a/b', '--config=configs/paper.py']) == 'a/b'
    assert local.latest_step(tmp_path) == -1
    assert local.latest_step(tmp_path / 'a' / ('b' * 999)) == -1
    for name in ('5', '20', '20.orbax-checkpoint-tmp-3', 'notes'):
        (tmp_path / 'checkpoints' / name).mkdir(parents=True)
    assert local.latest_step(tmp_path) == 20


class Slurm:
    """The batch script, with stand-ins for SLURM's commands; `srun` does what it is told, in turn."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / 'log'
        for name in ('srun', 'scontrol', 'scancel', 'python'):
            self.command(name, f'echo {name} "$@" >> {self.log}')
        self.latest('-1')
        self.command('squeue', 'echo RUNNING')
        os.mkfifo(folder / 'fifo')

    def command(self, name: str, script: str) -> None:
        (self.folder / name).write_text(f'#!/bin/bash\n{script}\n')
        (self.folder / name).chmod(0o755)

    def latest(self, *steps: str) -> None:
        """What the steps of the latest checkpoint are, one time after the other; then the last."""
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

    def run(self) -> tuple[int, list[str]]:
        """(exit code, the commands of SLURM that were given)."""
        done = subprocess.run(
            [
                'bash',
                ROOT / 'experiments/launch/slurm.sbatch',
                '--config=configs/a.py',
                '--workdir=w',
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=30,
            env={
                'PATH': f'{self.folder}:/usr/bin:/bin',
                'PYTHON': f'{self.folder}/python',
                'SLURM_JOB_ID': '7',
            },
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
    # As if SLURM had sent it; the tasks take their time.
    asked = f'kill -TERM $PPID; read < {fifo}; sleep 0.2; echo saved >> {slurm.log}; exit {code}'
    slurm.srun('exit 76', asked)
    slurm.command('scancel', f'echo scancel "$@" >> {slurm.log}; echo > {fifo}')
    srun = SRUN.format(tmp_path)
    assert slurm.run() == (
        75,
        [srun, srun, 'scancel --signal=TERM 7', 'saved', 'scontrol requeue 7'],
    )


def test_a_cancelled_job_does_not_come_back(tmp_path):
    slurm = Slurm(tmp_path)
    slurm.srun('kill -TERM $PPID; exit 75')
    slurm.command('squeue', 'echo COMPLETING')
    assert slurm.run() == (75, [SRUN.format(tmp_path)])
