"""Multi-process runs: how the processes find each other, agree, and exit.

JAX's runtime connects them. A process that fails exits immediately, without waiting for the others. They
notice at their next collective operation or, if they wait for none, when its heartbeats stop.
"""

import contextlib
import importlib.util
import json
import os
import sys
import threading
import uuid
import warnings
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from alexnet_jax.common import errors, paths
from alexnet_jax.common.errors import UserError, one_line
from alexnet_jax.devices import mesh as meshes

# The variables by which JAX detects each cluster; it needs all of them.
CLUSTERS = {
    'SLURM': (
        'SLURM_JOB_ID',
        'SLURM_STEP_NODELIST',
        'SLURM_NTASKS',
        'SLURM_PROCID',
        'SLURM_LOCALID',
    ),
    'Open MPI': (
        'OMPI_MCA_orte_hnp_uri',
        'OMPI_COMM_WORLD_SIZE',
        'OMPI_COMM_WORLD_RANK',
        'OMPI_COMM_WORLD_LOCAL_RANK',
    ),
    'a TPU pod': ('TPU_WORKER_HOSTNAMES', 'TPU_WORKER_ID'),
    'Kubernetes': ('KUBERNETES_SERVICE_HOST', 'JOB_COMPLETION_INDEX'),
}
OWN = ('RESOURCE_EXHAUSTED', 'INVALID_ARGUMENT', 'UNIMPLEMENTED')  # JAX errors of a single process
HEARTBEAT = 30  # seconds; a process that is silent for longer is lost


def start(
    *,
    coordinator: str,
    num_processes: int,
    process_id: int,
    distributed: bool,
    connect_timeout: int,
) -> None:
    """Joins the other processes of the run, if any. Call this before using JAX.

    Args:
      coordinator: HOST:PORT where process 0 listens.
      num_processes: number of processes; 0: not given.
      process_id: index of this process, counting from 0; -1: not given.
      distributed: detect all three through SLURM, Open MPI, a TPU pod or Kubernetes.
      connect_timeout: seconds to wait for all processes.

    Raises:
      UserError: the values are incomplete or invalid, or not all processes connected in time.
    """
    for name, value, least in (
        ('num_processes', num_processes, 0),
        ('process_id', process_id, -1),
        ('connect_timeout', connect_timeout, 1),
    ):
        if value < least:
            raise UserError(f'--{name}={value}: must be at least {least}')
    given = (bool(coordinator), num_processes > 0, process_id >= 0)
    if distributed and any(given):
        raise UserError(
            '--distributed detects these settings: remove --coordinator, --num_processes '
            'and --process_id'
        )
    if not distributed and not any(given):
        return
    if not distributed:
        if not all(given):
            raise UserError(
                '--coordinator, --num_processes and --process_id belong together: give '
                'all three, or --distributed under SLURM or on a TPU pod'
            )
        host, _, port = coordinator.rpartition(':')
        if not host or not port.isdigit():
            raise UserError(f'--coordinator={coordinator}: give HOST:PORT, such as node1:12345')
        if process_id >= num_processes:
            raise UserError(
                f'--process_id={process_id}: with --num_processes={num_processes} it must be '
                f'0 to {num_processes - 1}'
            )
    arguments = (
        {}
        if distributed
        else {
            'coordinator_address': coordinator,
            'num_processes': num_processes,
            'process_id': process_id,
        }
    )
    message = (
        f'{coordinator or "--distributed"}: the processes of this run did not find each other within '
        f'{connect_timeout} s; start all of them with the same --num_processes, a --process_id counting '
        'from 0, and a free port on the machine of process 0 that the others can reach'
    )
    # At a timeout of its own, JAX aborts the process with a stack trace.
    clock = threading.Timer(connect_timeout, _give_up, [message])
    clock.daemon = True
    clock.start()
    try:
        with warnings.catch_warnings():
            # `_cluster` says it in one line
            warnings.filterwarnings('ignore', 'Kubernetes environment detected')
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=connect_timeout + 60,
                heartbeat_timeout_seconds=HEARTBEAT,
                shutdown_timeout_seconds=HEARTBEAT,
            )
    except Exception as error:  # of any kind: this also queries cluster servers
        if distributed and (problem := _cluster(error)):
            raise UserError(f'--distributed: {problem}') from error
        raise UserError(f'{message} ({one_line(error)})') from error
    finally:
        clock.cancel()
    meshes.start_devices()
    counts = multihost_utils.process_allgather(np.int32(num_processes)).tolist()
    if len({*counts}) > 1:
        raise UserError(
            f'--num_processes is {counts} in the processes of this run: give all the same number'
        )


def _cluster(error: Exception) -> str:
    """Describes the cluster variables that made `initialize` fail; '' if none did."""
    advice = 'give --coordinator, --num_processes and --process_id instead'
    missing = {
        name: [variable for variable in variables if not os.environ.get(variable)]
        for name, variables in CLUSTERS.items()
    }
    whole = [name for name in missing if not missing[name]]
    if whole == ['Kubernetes'] and not importlib.util.find_spec('kubernetes'):
        return f"Kubernetes needs the package kubernetes: pip install 'jax[k8s]', or {advice}"
    if whole:
        wrong = isinstance(error, ValueError)
        return f'invalid {whole[0]} variables ({one_line(error)}); or {advice}' if wrong else ''
    for name, variables in CLUSTERS.items():
        if there := [variable for variable in variables if variable not in missing[name]]:
            return (
                f'this looks like {name} ({there[0]} is set), but {", ".join(missing[name])} '
                f'{"is" if len(missing[name]) == 1 else "are"} not set; start the command as a task of '
                f'the cluster, as with srun or mpirun, or {advice}'
            )
    return f'found no environment variables of {", ".join(CLUSTERS)}; {advice}'


def is_first() -> bool:
    """Whether this process writes and logs: process 0, or the only one."""
    return jax.process_index() == 0


def _give_up(message: str) -> None:
    line, code = errors.end(UserError(message))
    print(line, file=sys.stderr, flush=True)
    os._exit(code)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Wraps a command: a process that fails exits immediately, without waiting for the others."""
    try:
        yield
    except errors.Stopped:  # all have stopped, and disconnect normally
        raise
    except BaseException as error:
        leave(error)
        raise


def leave(error: BaseException) -> None:
    """Exits with the exit code of an error if this is one process of several; otherwise returns."""
    if jax.process_count() == 1:
        return
    line, code = errors.end(error)
    own = str(error).startswith(OWN)
    if isinstance(error, jax.errors.JaxRuntimeError) and not own:
        line, code = (
            f'error: another process of this run was lost or failed ({one_line(error)}); restart all of '
            'them to resume from the last checkpoint',
            errors.LOST,
        )
    print(f'process {jax.process_index()}: {line}', file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)  # a normal exit of JAX and orbax would wait for processes that wait for this one


def agree(what: dict) -> None:
    """Raises UserError unless `what`, a JSON object, is the same in all processes."""
    if jax.process_count() == 1:
        return
    text = np.frombuffer(json.dumps(what, sort_keys=True).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(max(lengths), np.uint8)
    padded[: len(text)] = text
    padded = multihost_utils.process_allgather(padded)
    first, *others = (json.loads(bytes(x[:n])) for x, n in zip(padded, lengths, strict=True))
    for process, other in enumerate(others, start=1):
        differing = [
            f'{name}: {first.get(name)!r} in process 0, {other.get(name)!r} in process {process}'
            for name in sorted({*first, *other})
            if first.get(name) != other.get(name)
        ]
        if differing:
            raise UserError(f'the processes of this run differ: {"; ".join(differing)}')


def check_shared(workdir: paths.Path) -> None:
    """Raises UserError unless all processes see files that process 0 writes to the work directory."""
    token = np.frombuffer(uuid.uuid4().bytes, np.uint8)
    token = bytes(multihost_utils.broadcast_one_to_all(token)).hex()
    file = paths.existing(workdir) / f'.alexnet_jax-{token}'
    with contextlib.suppress(paths.failures(file)):
        if jax.process_index() == 0:
            file.write_bytes(b'')
    multihost_utils.sync_global_devices('token written')
    found = np.atleast_1d(multihost_utils.process_allgather(np.bool_(file.exists())))
    if jax.process_index() == 0:
        file.unlink(missing_ok=True)
    if not found[0]:
        raise UserError(f'--workdir={workdir}: process 0 cannot write there; give another')
    if not found.all():
        blind = ', '.join(map(str, np.flatnonzero(~found)))
        raise UserError(
            f'--workdir={workdir}: process {blind} cannot see the files that process 0 '
            'writes there; give a folder that all of them share'
        )
