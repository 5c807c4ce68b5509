"""Tests that `tests.chaos` detects what it checks for, and runs it briefly."""

import concurrent.futures
import re
import sys

import numpy as np
import pytest

from alexnet_jax.common.errors import UserError
from tests import chaos

DUE = [15, 30, 38, 45, 60, 75, 90]


def a_start(**changes):
    """A start that resumed at 15 and was killed after step 33, while writing the checkpoint of 30."""
    start = chaos.Start(
        saves='background',
        killed=True,
        wait=8.0,
        resumed=15,
        steps=list(range(15, 35, 2)),
        newest=15,
    )
    return start._replace(**changes)


def test_checkpoints_are_due():
    """They are due every 15 steps, after every 5 epochs of 7.5 steps, and at the end."""
    assert chaos.due_steps(90) == DUE
    assert chaos.due_steps(135)[-4:] == [105, 113, 120, 135]


@pytest.mark.parametrize(
    ('last', 'newest', 'saves'),
    [
        (13, 0, 'wait'),  # before the first checkpoint
        (57, 45, 'wait'),
        (61, 45, 'background'),
        (73, 45, 'background'),  # the checkpoint of 75 waits for that of 60
        (89, 90, 'wait'),
        (43, 45, 'wait'),
    ],
)
def test_steps_that_a_kill_may_cost(last, newest, saves):
    start = a_start(resumed=0, steps=list(range(1, last + 1, 2)), newest=newest)
    assert chaos.problems(start, DUE) == []
    assert (chaos.problems(start._replace(saves='wait'), DUE) == []) == (saves == 'wait')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'steps': list(range(15, 39))}, 'reached step 39, .* of step 15, .* due at 30 and 38'),
        ({'resumed': 0, 'newest': 0, 'steps': list(range(1, 32, 2))}, 'reached step 32, .* step 0'),
        ({'newest': 0}, 'the checkpoint of step 15 was lost; the newest is 0'),
        ({'resumed': 30, 'newest': 30}, 'with a row of step 15, not 31'),
        ({'steps': [19, 21]}, 'with a row of step 19, not 15'),
    ],
    ids=str,
)
def test_broken_promises_of_a_start_are_seen(changes, message):
    """One step too many is repeated, a checkpoint is lost, steps are skipped."""
    assert chaos.problems(a_start(), DUE) == []
    assert chaos.problems(a_start(steps=list(range(15, 38))), DUE) == []
    assert re.search(message, '\n'.join(chaos.problems(a_start(**changes), DUE)))


def test_rows_of_one_start():
    def row(kind, step, speed):
        return {'kind': kind, 'step': step, 'images_per_second': speed}

    before = [row('train', 1, 5.0), row('train', 3, 6.0), row('eval', 4, 0.0), row('train', 5, 7.0)]
    assert chaos.own_rows(before, before) == []
    assert chaos.own_rows(before, before[:2]) == []  # it has removed rows that it will repeat
    assert chaos.own_rows(before, [*before[:3], row('train', 5, 7.5)]) == [5]
    assert chaos.own_rows([], before) == [1, 3, 5]


def test_a_plan_has_every_kind_of_kill_in_order():
    kills = chaos.plan(30, np.random.default_rng(0))
    kinds = [kill.kind for kill in kills]
    assert [kinds.count(kind) for kind in ('saving', 'training', 'starting')] == [10, 15, 5]
    assert all(24 * i < kill.step <= 24 * (i + 1) for i, kill in enumerate(kills))


def test_the_moment_of_a_kill():
    training, saving, starting = (
        chaos.Kill(k, 15, 0.0, 0.5) for k in ('training', 'saving', 'starting')
    )
    assert not training.due(2.0, [], True) and not training.due(2.0, [11, 13], True)
    assert training.due(2.0, [11, 13, 15], False)
    assert not saving.due(2.0, [11, 13, 15], False) and saving.due(2.0, [11, 13, 15], True)
    assert not starting.due(0.4, [], False) and starting.due(0.5, [], False)
    assert starting.due(0.4, [1], False)  # it was faster than usual


def outcome(scale=1.0, **changes):
    kernel = scale * np.random.default_rng(0).normal(size=36)
    arrays = {
        'params/fc8/kernel': kernel.astype(np.float32).tobytes(),
        'opt_state/0/trace/fc8/kernel': bytes(144),
        'step': np.array(60, np.int32).tobytes(),
    }
    rows = [{'kind': 'train', 'step': s, 'loss': 1 / (s + 1), 'weights': 0.02} for s in (1, 3, 5)]
    parts = {'step': 60, 'arrays': arrays, 'meta': {'history': {'38': 70.0}}, 'rows': rows}
    return tuple((parts | changes).values())


def test_what_differs_is_seen():
    """One bit, a row that is changed, missing or extra, a different history, a different end."""
    _, arrays, _, rows = alone = outcome()
    assert chaos.differences(alone, alone) == []
    for name, bits in arrays.items():
        flipped = arrays | {name: bytes([bits[0] ^ 1]) + bits[1:]}
        assert chaos.differences(outcome(arrays=flipped), alone) == [f'{name} differs']
    for other in (
        [*rows[:2], {**rows[2], 'loss': np.nextafter(1 / 6, 1)}],
        rows[:2],
        [*rows, rows[0]],
    ):
        (line,) = chaos.differences(outcome(rows=other), alone)
        assert line.startswith('a row of metrics.jsonl is {')
    assert 'history' in chaos.differences(outcome(meta={}), alone)[0]
    assert chaos.differences(outcome(step=55), alone) == ['the last step is 55, not 60']


def test_what_differs_by_more_than_rounding_is_seen():
    alone = outcome()
    rounded = [{**row, 'loss': 0.1} for row in alone[3]]
    assert chaos.too_far(outcome(rows=rounded), alone, alone) == []
    assert len(chaos.too_far(outcome(rows=rounded[:2]), alone, alone)) == 1
    assert chaos.too_far(outcome(step=55), alone, alone) == ['the last step is 55, not 60']
    assert len(chaos.too_far(outcome(scale=np.nan), alone, alone)) == 2


@pytest.mark.parametrize(
    ('times', 'lines'), [(0.0, 0), (-1.9, 0), (2.9, 0), (-2.1, 1), (3.1, 1), (5.0, 2)]
)
def test_distances(times, lines):
    """1x1, 2x2 and the killed run lie on a line, at 0, d and times * d."""
    one, four, found = (outcome(scale=1 + x * 1e-3) for x in (0, 1, times))
    assert chaos.distance(four, one) == pytest.approx(1e-3, rel=1e-3)
    assert chaos.distance(found, one) == pytest.approx(abs(times) * 1e-3, rel=1e-3)
    assert len(chaos.too_far(found, one, four)) == lines


def test_what_is_left_of_a_run(tmp_path, monkeypatch):
    """A run that ended early, lost a checkpoint and left a half-written one."""
    starts = [a_start(), a_start(killed=False, newest=0, steps=[])]
    monkeypatch.setattr(chaos.Job, 'start', lambda *_: starts.pop(0))
    for name in ('38', '45', '30.orbax-checkpoint-tmp'):
        (tmp_path / 'same' / 'checkpoints' / name).mkdir(parents=True)
    assert chaos.Job(tmp_path, kills=2, seed=0).killed('same', [(1, 2)] * 3) == [
        'same, start 2: the checkpoint of step 15 was lost; the newest is 0',
        'same: it ended after 1 of 2 kills',
        'same: half-written entries left in checkpoints/: 30.orbax-checkpoint-tmp',
    ]


def test_a_start_that_fails_is_seen(tmp_path):
    job = chaos.Job(tmp_path, kills=1, seed=0, program=('-c', 'raise SystemExit(3)'))
    with pytest.raises(RuntimeError, match=r'same: exit code 3 after .*/same\.log'):
        job.start('same', (1, 2))


def test_command(tmp_path, monkeypatch):
    """It exits with 1 and a line if a promise is broken."""
    monkeypatch.setattr(chaos.Job, 'alone', lambda job, mesh: mesh)
    monkeypatch.setattr(chaos, 'same_mesh', lambda job, alone: [f'{job.kills} {alone}'])
    monkeypatch.setattr(chaos, 'other_meshes', lambda job, *alone: [str(alone)])
    monkeypatch.setattr(sys, 'argv', ['chaos', '--kills=3', f'--workdir={tmp_path}/new'])
    with pytest.raises(SystemExit) as stopped:
        chaos.main()
    # Python exits with 1 if given a text
    assert stopped.value.code == 'broken: 3 (2, 2)\nbroken: ((1, 1), (2, 2))'
    with pytest.raises(UserError, match='File exists; choose another'):
        chaos.main()


@pytest.fixture(scope='module')
def broken(tmp_path_factory):
    """Runs both comparisons briefly and in parallel; without TensorFlow, whose import takes seconds."""
    driver = (
        'import sys; sys.modules["tensorflow"] = None\n'
        'from alexnet_jax import command, main\n'
        'command.run(main.main)'
    )
    folder = tmp_path_factory.mktemp('chaos')
    chaos.draw_pictures(folder / 'pictures', np.random.default_rng(0))
    job = chaos.Job(folder, kills=2, seed=21, program=('-c', driver))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        one, four = pool.map(job.alone, [(1, 1), (2, 2)])
        found = (
            pool.submit(chaos.same_mesh, job, four),
            pool.submit(chaos.other_meshes, job, one, four),
        )
        assert 0 < chaos.distance(four, one) < 1e-6  # one batch with wrong labels makes 1e-3
        return [lines.result() for lines in found]


@pytest.mark.full
def test_killed_on_one_mesh(broken):
    assert broken[0] == []


@pytest.mark.full
def test_killed_between_meshes(broken):
    assert broken[1] == []
