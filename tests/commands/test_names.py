"""Sources, stores, run directories and figures can have any name that a file system allows."""

import pytest

from alexnet_jax import evaluate, main, predict, retrieve, visualize
from alexnet_jax.common.errors import Stopped
from tests.helpers import ODD
from tests.helpers.fixtures import write_tree
from tests.helpers.run_dirs import call

SMALL = {
    'data.size': 72,
    'augment.crop': 64,
    'model.width': 0.0625,
    'train.batch': 8,
    'optim.epochs': 2.0,
    'optim.drops': (),
    'run.mesh': (1, 1),
    'run.log_every': 1,
    'run.eval_batch': 8,
    'run.profile': (1, 2),
}


@pytest.mark.slow
def test_every_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source, run, output = f's{ODD}', f'./-r{ODD}', f'{ODD}.png'
    names = ['a', f'b{ODD[:-2]}']  # a class is a line of a text file
    for split, count in (('train', 10), ('val', 3)):
        write_tree(tmp_path / source / split, dict.fromkeys(names, count))
    arguments = ['--config=quickstart', f'--config.data.source={source}', f'--workdir={run}']
    arguments += [f'--config.{name}={value}' for name, value in SMALL.items()]
    with pytest.raises(Stopped):
        call(monkeypatch, main, *arguments, '--config.run.stop_after=3')
    call(monkeypatch, main, *arguments)
    assert list((tmp_path / run / 'profile').rglob('*.xplane.pb'))
    call(monkeypatch, evaluate, run, '--views=center')
    assert '(step 5)' in capsys.readouterr().out
    picture = f'{source}/val/{names[1]}/000.jpg'
    call(monkeypatch, predict, run, picture, '--output', output)
    assert f'(correct: {names[1]})' in capsys.readouterr().out
    for command in (retrieve, visualize):
        (tmp_path / output).unlink()
        call(monkeypatch, command, run, '--output', output)
    assert (tmp_path / output).exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([source, run[2:], output, 'data'])
