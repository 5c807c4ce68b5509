"""Multi-process runs: the same bits as one process, and what happens on disagreement, stops and kills."""

import functools
import itertools
import signal
import subprocess
import sys
import time

import pytest

from alexnet_jax.common.errors import UserError
from alexnet_jax.devices import distributed
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.input.store import open_store
from alexnet_jax.rundir import metrics
from alexnet_jax.training import evaluation, inference
from alexnet_jax.training.metrics import values
from tests.helpers.commands import (
    ROOT,
    WITHOUT_TENSORFLOW,
    assert_same,
    command,
    environment,
    make_store,
    outcome,
)
from tests.helpers.processes import free_port

MESH = '--config.run.mesh=(2,2)'
EPOCHS, STEPS = '--config.optim.epochs={}', 5  # steps of an epoch
# two pairs of an epoch's five steps
GROUPS = ('--config.run.dispatch=2', '--config.run.checkpoint_every=4')


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp('store') / 'tiny')


@pytest.fixture
def start_all():
    """Starts one process per list of arguments, with two devices each; kills them all at the end."""
    started = []

    def start(
        workdir, store, *arguments, epochs=8, processes=(2, 2), events=('never', 'never'), number=1
    ):
        port = free_port()
        for process, (more, count, event) in enumerate(
            zip(arguments or ((), ()), processes, events, strict=True)
        ):
            line = command(
                workdir,
                store,
                '--cpu_devices=2',
                MESH,
                EPOCHS.format(float(epochs)),
                *GROUPS,
                f'--coordinator=localhost:{port}',
                f'--num_processes={count}',
                f'--process_id={process}',
                '--connect_timeout=10',
                *more,
                event=event,
                number=number,
            )
            started.append(
                subprocess.Popen(
                    line,
                    cwd=ROOT,
                    env=environment(store),
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            )
        return started[-len(processes) :]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ends(processes, timeout=200):
    """Returns (exit code, output) of each process."""
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    return [(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]


def evaluated_by_two(workdir, store):
    """What `alexnet_jax.evaluate` prints when run as two processes with two devices each."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                '-c',
                WITHOUT_TENSORFLOW,
                'alexnet_jax.evaluate',
                str(workdir),
                '--batch=4',
                '--confusion',
                '--cpu_devices=2',
                f'--coordinator=localhost:{port}',
                '--num_processes=2',
                f'--process_id={process}',
            ],
            cwd=ROOT,
            env=environment(store),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for process in range(2)
    ]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    own = [[line for line in out.splitlines() if '[Gloo]' not in line] for out, _ in outputs]
    assert own[1] == []
    return '\n'.join(own[0])


# Epochs; (victim, how it saves) of each kill; signals to one process as it starts; other ways to stop
SOME = (4, (), (), ())
ALL = (
    8,
    ((1, 'background'), (1, 'wait'), (0, 'wait')),
    ('SIGTERM while starting', 'SIGTERM before the first step'),
    (
        ('SIGINT', (), ('Ctrl-C', 'one of the processes was asked')),
        ('slow', ('--config.run.stop_after=1s',), ('stop_after=1s',) * 2),
    ),
)


@pytest.mark.parametrize(
    ('epochs', 'kills', 'starts', 'stops'),
    [
        pytest.param(*SOME, id='some', marks=pytest.mark.slow),
        pytest.param(*ALL, id='all', marks=pytest.mark.full),
    ],
)
def test_two_processes_have_the_bits_of_one_whatever_happens_to_them(
    store, tmp_path, start_all, epochs, kills, starts, stops
):
    """SIGTERM to one, kills while saving, a stop during startup, Ctrl-C, a time limit, then to the end."""
    line = command(
        tmp_path / 'alone', store, '--cpu_devices=4', MESH, EPOCHS.format(float(epochs)), *GROUPS
    )
    subprocess.run(line, cwd=ROOT, env=environment(store), check=True, capture_output=True)
    alone = outcome(tmp_path / 'alone')

    workdir, steps = tmp_path / 'run', epochs * STEPS
    start_all = functools.partial(start_all, epochs=epochs)
    stopped = ends(start_all(workdir, store, events=('never', 'SIGTERM'), number=4))
    step = outcome(workdir)[0]
    assert 0 < step < steps
    for code, output in stopped:
        assert (code, f'stopped at step {step} (' in output) == (75, True), output[-2000:]

    # Kill one while it writes its part of the second checkpoint from here. The other notices within a
    # step or, if it is waiting for the checkpoint, when the heartbeats stop; JAX may notice first, and
    # abort.
    lost = {76: 'another process of this run was lost'}
    aborted = {-signal.SIGABRT: 'another task died'}
    for victim, saves in kills:
        words = lost if saves == 'background' else lost | aborted
        events = ['never', 'never']
        events[victim] = 'save'
        more = [(f'--config.run.saves={saves}',)] * 2
        processes = start_all(workdir, store, *more, events=events, number=2)
        processes[victim].communicate(timeout=200)
        killed = time.monotonic()
        ((code, output),) = ends([processes[1 - victim]])
        assert processes[victim].returncode == -signal.SIGKILL
        assert code in words and words[code] in output, (code, output[-2000:])
        assert time.monotonic() - killed < 60
        assert outcome(workdir)[0] < steps

    for event in starts:
        for code, output in ends(start_all(workdir, store, events=('never', event))):
            assert (code, 'one of the processes was asked' in output) == (75, True), output[-2000:]

    for event, more, words in stops:
        stopped = ends(start_all(workdir, store, more, more, events=(event, 'slow')))
        step = outcome(workdir)[0]
        assert step < steps
        for (code, output), why in zip(stopped, words, strict=True):
            assert (code, f'stopped at step {step} ({why}' in output) == (75, True), output[-2000:]

    for code, output in ends(start_all(workdir, store)):
        assert code == 0, output[-2000:]
    assert_same(outcome(workdir), alone)

    # Evaluate with two processes and, in this process, with all devices and with one.
    if kills:
        printed = evaluated_by_two(workdir, store)
        results = evaluation.compare([workdir], batch=4, confusion=True)
        assert printed.startswith(f'{evaluation.table(results)}\nmost often confused by ')
        matrix = results[[*results][-1]]['confusion']
        rows = (workdir / 'confusion.csv').read_text().splitlines()[1:]
        assert [row.split(',')[1:] for row in rows] == [[*map(str, row)] for row in matrix]
    mesh = meshes.make((1, 1), towers=2, batches={})
    trained = inference.open_run(workdir, mesh)
    predict = inference.predictor(trained, mesh, 'center')
    sums = evaluation.evaluate([predict], mesh, open_store(store), split='val', batch=4, threads=1)
    (*_, last) = (row for row in metrics.read(workdir) if row['kind'] == 'eval')
    found = values(sums)
    assert found['top1_error'] == last['top1_error']
    assert found['loss'] == pytest.approx(last['loss'], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('second', 'event', 'message'),
    [
        (
            ('--config.train.batch=4', '--workdir={}/other'),
            'never',
            "differ: --workdir: '{}/run' in process 0, '{}/other' in process 1; config.train.batch: 8 in",
        ),
        ((), 'blind', 'process 1 cannot see'),
    ],
)
def test_processes_that_disagree(store, tmp_path, start_all, second, event, message):
    second = [argument.format(tmp_path) for argument in second]
    message = message.format(tmp_path, tmp_path)
    found = ends(
        start_all(tmp_path / 'run', store, (), second, events=('never', event)), timeout=100
    )
    assert [code for code, _ in found] == [2, 2], found
    assert any(message in output for _, output in found), found
    assert not any('Traceback' in output for _, output in found)
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ('counts', 'message'),
    [((2, 3), '--num_processes is [2, 3]'), ((3, 2), 'did not find each other within 5 s')],
)
def test_process_counts_that_disagree(store, tmp_path, start_all, counts, message):
    briefly = [('--connect_timeout=5',)] * 2
    found = ends(start_all(tmp_path / 'run', store, *briefly, processes=counts), timeout=100)
    assert [code for code, _ in found] == [2, 2], found
    assert all(message in output for _, output in found), found
    assert not any('Traceback' in output for _, output in found)


@pytest.mark.slow
def test_a_coordinator_that_is_not_there(store, tmp_path):
    line = command(
        tmp_path / 'run',
        store,
        '--coordinator=localhost:9',
        '--num_processes=2',
        '--process_id=1',
        '--connect_timeout=3',
    )
    done = subprocess.run(
        line,
        cwd=ROOT,
        env=environment(store),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert (
        'localhost:9: the processes of this run did not find each other within 3 s' in done.stderr
    )
    assert not (tmp_path / 'run').exists()


WHOLE_SLURM = {name: '1' for name in distributed.CLUSTERS['SLURM']}


@pytest.mark.parametrize(
    ('variables', 'message'),
    [
        ({}, 'no environment variables of SLURM, Open MPI, a TPU pod, Kubernetes;'),
        (
            {'SLURM_JOB_ID': '3'},
            r'SLURM \(SLURM_JOB_ID is set\), but SLURM_STEP_NODELIST, .* not set',
        ),
        (
            {**WHOLE_SLURM, 'SLURM_PROCID': ''},
            r'SLURM \(SLURM_JOB_ID is set\), but SLURM_PROCID is not set; .* srun',
        ),
        ({**WHOLE_SLURM, 'SLURM_NTASKS': 'x'}, "invalid SLURM .*variables.*: 'x'"),
        ({'OMPI_COMM_WORLD_RANK': '0'}, 'Open MPI .*, but OMPI_MCA_orte_hnp_uri, .* are not set'),
        (
            {'OMPI_MCA_orte_hnp_uri': '4096.0;tcp://10.0.0.1:3'},
            'but OMPI_COMM_WORLD_SIZE, .* are not set',
        ),
        ({'TPU_WORKER_ID': '0'}, 'a TPU pod .*, but TPU_WORKER_HOSTNAMES is not set'),
        ({'KUBERNETES_SERVICE_HOST': '10.0.0.1'}, 'but JOB_COMPLETION_INDEX is not set'),
        (
            {'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '0'},
            'the package kubernetes: pip install',
        ),
    ],
)
def test_a_cluster_that_is_not_there_or_not_whole(monkeypatch, variables, message):
    for name in itertools.chain(*distributed.CLUSTERS.values()):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr('jax._src.xla_bridge.backends_are_initialized', lambda: False)
    flags = {'coordinator': '', 'num_processes': 0, 'process_id': -1, 'connect_timeout': 60}
    with pytest.raises(
        UserError, match=f'^--distributed: .*{message}.* give --coordinator'
    ) as error:
        distributed.start(**flags, distributed=True)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        (('localhost:1', 0, 0, False, 1), 'belong together'),
        (('', 2, 0, False, 1), 'belong together'),
        (('localhost:1', 2, -1, False, 1), 'belong together'),
        (('localhost', 2, 0, False, 1), 'HOST:PORT'),
        (('localhost:1', 2, 2, False, 1), 'it must be 0 to 1'),
        (('localhost:1', 2, 0, True, 1), 'remove --coordinator'),
        (('localhost:1', -2, 0, False, 1), 'num_processes=-2: must be at least 0'),
        (('', 0, -1, False, 0), 'connect_timeout=0: must be at least 1'),
    ],
)
def test_flags_that_do_not_belong_together(given, message):
    with pytest.raises(UserError, match=message):
        flags = ('coordinator', 'num_processes', 'process_id', 'distributed', 'connect_timeout')
        distributed.start(**dict(zip(flags, given, strict=True)))
