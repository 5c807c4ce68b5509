"""The chaos experiment: that it sees what it looks for, and a short run of it."""

import concurrent.futures
import json
import re
import sys

import numpy as np
import pytest

from alexnet_jax.common.errors import UserError
from experiments import chaos

DUE = [15, 30, 38, 45, 60, 75, 90]
STEPS = 78  # of the short runs


def a_start(**changes):
    """Resumed at 15, killed after step 33, while the checkpoint of 30 was being written."""
    start = chaos.Start(
        mesh=(1, 2),
        kind='training',
        killed=True,
        seconds=9.0,
        wait=8.0,
        resumed=15,
        steps=list(range(15, 35, 2)),
        newest=15,
        saving=True,
    )
    return start._replace(**changes)


def test_checkpoints_are_due():
    """Every 15 steps, after every 5 epochs of 7.5 steps, and at the end."""
    assert chaos.due_steps(90) == DUE
    assert chaos.due_steps(135)[-4:] == [105, 113, 120, 135]


@pytest.mark.parametrize(
    ('last', 'newest', 'expected'),
    [
        (13, 0, (14, 0)),  # before the first checkpoint
        (57, 45, (13, 0)),
        (61, 45, (15, 2)),
        (73, 45, (15, 14)),  # the checkpoint of 75 waits for that of 60
        (89, 90, (0, 0)),
        (43, 45, (0, 0)),
    ],
)
def test_steps_repeated(last, newest, expected):
    start = a_start(resumed=0, steps=list(range(1, last + 1, 2)), newest=newest)
    assert chaos.repeated(start, DUE) == expected
    assert chaos.problems(start, DUE, 'background') == []
    assert (chaos.problems(start, DUE, 'wait') == []) == (expected[1] == 0)
    assert chaos.repeated(start._replace(steps=[]), DUE) == (0, 0)  # counted with an earlier kill


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'steps': list(range(15, 39))}, r'15 \+ 9 steps after .* 15 .* due at 30 and 38'),
        ({'resumed': 0, 'newest': 0, 'steps': list(range(1, 32, 2))}, r'15 \+ 17 steps after'),
        ({'newest': 0}, 'the checkpoint of step 15 was lost, 0 is the newest'),
        ({'resumed': 30, 'newest': 30}, 'with a row of step 15, not 31'),
        ({'steps': [19, 21]}, 'with a row of step 19, not 15'),
    ],
    ids=str,
)
def test_broken_promises_of_a_start_are_seen(changes, message):
    """One step too many is done again, a checkpoint is lost, steps are left out."""
    assert chaos.problems(a_start(), DUE, 'background') == []
    assert chaos.problems(a_start(steps=list(range(15, 38))), DUE, 'background') == []
    assert re.search(message, '\n'.join(chaos.problems(a_start(**changes), DUE, 'background')))


def test_rows_of_one_start():
    def row(kind, step, speed):
        return {'kind': kind, 'step': step, 'images_per_second': speed}

    before = [row('train', 1, 5.0), row('train', 3, 6.0), row('eval', 4, 0.0), row('train', 5, 7.0)]
    assert chaos.own_rows(before, before) == []
    assert chaos.own_rows(before, before[:2]) == []  # it has removed what it will do again
    assert chaos.own_rows(before, [*before[:3], row('train', 5, 7.5)]) == [5]
    assert chaos.own_rows([], before) == [1, 3, 5]


def test_a_plan_has_every_kind_of_kill_in_order():
    kills = chaos.plan(30, 24, np.random.default_rng(0))
    kinds = [kill.kind for kill in kills]
    assert [kinds.count(kind) for kind in ('saving', 'training', 'starting')] == [10, 15, 5]
    assert all(24 * i < kill.step <= 24 * (i + 1) for i, kill in enumerate(kills))
    again, other = (chaos.plan(30, 24, np.random.default_rng(seed)) for seed in (0, 1))
    assert kills == again != other


def test_the_moment_of_a_kill():
    training, saving, starting = (
        chaos.Kill(k, 15, 0.0, 0.5) for k in ('training', 'saving', 'starting')
    )
    assert not training.due(2.0, [], True) and not training.due(2.0, [11, 13], True)
    assert training.due(2.0, [11, 13, 15], False)
    assert not saving.due(2.0, [11, 13, 15], False) and saving.due(2.0, [11, 13, 15], True)
    assert not starting.due(0.4, [], False) and starting.due(0.5, [], False)
    assert starting.due(0.4, [1], False)  # it was faster than usual


@pytest.fixture
def ended():
    rng = np.random.default_rng(0)
    arrays = {
        'params/fc8/kernel': rng.normal(size=(2, 6, 3)).astype(np.float32),
        'opt_state/0/trace/fc8/kernel': np.zeros((2, 6, 3), np.float32),
        'step': np.array(60, np.int32),
    }
    rows = [
        {'kind': 'train', 'step': s, 'loss': 1 / (s + 1), 'weights': 0.02, 'waiting': s / 7}
        for s in (1, 3, 5)
    ]
    return chaos.Outcome(60, arrays, {'history': {'38': 70.0}, 'running': {}}, rows)


def changed(outcome, name, change):
    """A copy, with one array changed in place."""
    arrays = {key: x.copy() for key, x in outcome.arrays.items()}
    change(arrays[name])
    return outcome._replace(arrays=arrays)


def flip(array):
    array.view(np.uint32)[...].flat[0] ^= 1


def test_a_flipped_bit_is_seen(ended):
    assert chaos.compare_kept(ended, ended) == {'bits': 0, 'rows': 0, 'broken': []}
    for name in ended.arrays:
        found = chaos.compare_kept(changed(ended, name, flip), ended)
        assert found == {'bits': 1, 'rows': 0, 'broken': [f'kept: {name} differs in 1 bits']}
    minus = chaos.compare_kept(
        changed(ended, 'opt_state/0/trace/fc8/kernel', lambda x: np.negative(x, out=x)), ended
    )
    assert minus['bits'] == 36  # -0.0 equals 0.0


def test_other_rows_are_seen(ended):
    """One changed, one missing, one too many; but not their times."""
    rows = ended.rows
    slower = [{**row, 'waiting': 0.9, 'images_per_second': 3.0} for row in rows]
    assert chaos.differing_rows(slower, rows) == []
    (line,) = chaos.differing_rows([*rows[:2], {**rows[2], 'loss': np.nextafter(1 / 6, 1)}], rows)
    assert '0.16666666666666669' in line and '0.16666666666666666' in line
    assert (
        chaos.differing_rows([*rows[:2], {**rows[2], 'loss': 0.1}], rows, ignore=chaos.ROUNDED)
        == []
    )
    assert (
        len(chaos.differing_rows(rows[:2], rows)) == len(chaos.differing_rows(rows, rows[:2])) == 1
    )
    found = chaos.compare_kept(ended._replace(rows=rows[:2]), ended)
    assert found['rows'] == 1 and 'not {"kind": "train", "step": 5' in found['broken'][0]
    found = chaos.compare_changed(ended._replace(rows=rows[:2]), ended, ended)
    assert found['rows'] == len(found['broken']) == 1


def test_another_history_or_end_is_seen(ended):
    other = {'history': {'38': 71.0}, 'running': {}}
    assert 'history' in chaos.compare_kept(ended._replace(meta=other), ended)['broken'][0]
    assert 'the last step is 55' in chaos.compare_kept(ended._replace(step=55), ended)['broken'][0]
    found = chaos.compare_changed(ended._replace(step=55), ended, ended)
    assert found['broken'] == ['changed: the last step is 55, not 60']


@pytest.mark.parametrize(
    ('times', 'lines'), [(0.0, 0), (-1.9, 0), (2.9, 0), (-2.1, 1), (3.1, 1), (5.0, 2)]
)
def test_distances(ended, times, lines):
    """1x1, 2x2 and the killed run on one line, at 0, d and times * d."""

    def at(x):
        return changed(
            ended, 'params/fc8/kernel', lambda kernel: np.multiply(kernel, 1 + x, out=kernel)
        )

    found = chaos.compare_changed(at(times * 1e-3), ended, at(1e-3))
    assert found['d'] == pytest.approx(1e-3, rel=1e-3)
    assert found['from_1x1'] == pytest.approx(abs(times) * 1e-3, rel=1e-3)
    assert len(found['broken']) == lines
    velocity = changed(at(0.0), 'opt_state/0/trace/fc8/kernel', flip)
    assert chaos.distance(velocity, ended) == 0  # of the parameters alone


def test_distance_of_nan_is_too_far(ended):
    broken = changed(ended, 'params/fc8/kernel', lambda kernel: kernel.fill(np.nan))
    assert len(chaos.compare_changed(broken, ended, ended)['broken']) == 2


def test_what_is_left_of_a_run(tmp_path, monkeypatch):
    """It ended early, lost a checkpoint and left a half-written one."""
    starts = [a_start(), a_start(killed=False, newest=0, steps=[])]
    monkeypatch.setattr(chaos.Job, 'start', lambda *_: starts.pop(0))
    for name in ('38', '45', '30.orbax-checkpoint-tmp'):
        (tmp_path / 'kept' / 'checkpoints' / name).mkdir(parents=True)
    column = chaos.Job(tmp_path, devices=2, kills=2, seed=0).killed('kept', [(1, 2)] * 3)
    assert column['broken'] == [
        'kept, start 2: the checkpoint of step 15 was lost, 0 is the newest',
        'kept: it ended after 1 of 2 kills',
        'kept: left half-written in checkpoints/: 30.orbax-checkpoint-tmp',
    ]
    assert (column['kills'], column['kills_while_saving'], column['repeated_most']) == (
        1,
        1,
        (15, 4),
    )
    assert column['repeated_most_if_none_was_cut'] == 0 and column['finished_left'] == [38, 45]


def test_a_start_that_fails_is_seen(tmp_path):
    job = chaos.Job(tmp_path, 2, kills=1, seed=0, program=('-c', 'raise SystemExit(3)'))
    with pytest.raises(chaos.Broken, match=r'kept: exit code 3 after .*/kept\.log'):
        job.start('kept', (1, 2))


def test_command(tmp_path, monkeypatch, capsys):
    """It prints and writes a table, and ends with 1 and a line if a promise is broken."""
    column = {'meshes': ['1x2'], 'kills': 3, 'repeated_most': (11, 2), 'bits': 0, 'broken': []}
    monkeypatch.setattr(chaos.meshes, 'configure', lambda **_: None)
    monkeypatch.setattr(chaos.Job, 'alone', lambda job, mesh: (job.devices, job.total, mesh))
    monkeypatch.setattr(chaos, 'mesh_kept', lambda job, mesh, alone: column | {'alone': [alone]})
    monkeypatch.setattr(
        chaos, 'mesh_changed', lambda job, *alone: column | {'alone': alone, 'broken': ['a', 'b']}
    )
    monkeypatch.setattr(sys, 'argv', ['chaos', '--kills=3', f'--workdir={tmp_path}/new'])
    with pytest.raises(SystemExit) as stopped:
        chaos.main()
    assert stopped.value.code == 'broken: a\nbroken: b'  # Python's exit code for a text is 1
    assert re.search(r'most \(interval 15\) +11 \+ 2 +11 \+ 2\n', capsys.readouterr().out)
    record = json.loads((tmp_path / 'new' / 'chaos.json').read_text())
    assert record['broken'] == ['a', 'b'] and record['runs']['mesh kept']['kills'] == 3
    assert [run['alone'] for run in record['runs'].values()] == [
        [[2, 96, [1, 2]]],
        [[4, 96, [1, 1]], [4, 96, [2, 2]]],
    ]
    with pytest.raises(UserError, match='is there; remove it'):
        chaos.main()
    monkeypatch.setattr(sys, 'argv', ['chaos', '--kills=0', f'--workdir={tmp_path}/other'])
    with pytest.raises(UserError, match='at least 1'):
        chaos.main()
    assert not (tmp_path / 'other').exists()


@pytest.fixture(scope='module')
def columns(tmp_path_factory):
    """Both comparisons, short, at the same time; without TensorFlow, whose import takes seconds."""
    driver = (
        'import sys; sys.modules["tensorflow"] = None\n'
        'from alexnet_jax import command, main\n'
        'command.run(main.main)'
    )
    folder = tmp_path_factory.mktemp('chaos')
    chaos.draw_pictures(folder / 'pictures', np.random.default_rng(0))
    kept, changed = (
        chaos.Job(
            folder,
            devices=4,
            kills=kills,
            seed=21,
            steps=STEPS // (kills + 1),
            program=('-c', driver),
        )
        for kills in (2, 1)
    )
    with concurrent.futures.ThreadPoolExecutor() as pool:
        one, four = pool.map(kept.alone, [(1, 1), (2, 2)])
        columns = (
            pool.submit(chaos.mesh_kept, kept, (2, 2), four),
            pool.submit(chaos.mesh_changed, changed, one, four),
        )
        return [column.result() for column in columns]


@pytest.mark.slow
def test_killed_on_one_mesh(columns):
    column, _ = columns
    assert column['broken'] == []
    assert (column['kills'], column['bits'], column['rows']) == (2, 0, 0)
    assert {*column['finished_left']} < {*chaos.due_steps(STEPS)}
    assert column['finished_left'][-1] == STEPS and column['unfinished_left'] == []


@pytest.mark.slow
def test_killed_between_two_meshes(columns):
    _, column = columns
    assert column['broken'] == []
    assert (column['kills'], column['meshes']) == (1, ['1x1', '2x2'])
    assert column['starts'][1]['resumed'] > 0  # from there on, on the other mesh
    assert 0 < column['d'] < 1e-6  # one batch with wrong labels makes 1e-3
