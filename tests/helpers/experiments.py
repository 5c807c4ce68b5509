"""Experiments on a handful of images, in this process: `in_process`, `make`."""

import ast
import json

from alexnet_jax.common import configfile
from alexnet_jax.rundir import fingerprint
from alexnet_jax.training import loop
from experiments import lab
from tests.helpers.stores import write_store


def in_process(command, workdir, until):
    """Like `lab.in_new_process`, but in this process, and always to the end."""
    loop.train(configured(command), workdir)
    return False


def leave(command, workdir, until):
    """Leaves only the files that a start must leave. All starts have the same two images."""
    workdir.mkdir(parents=True)
    config, store = configured(command), workdir.parent.parent / 'pictures'
    config.data.store = str(store)
    if not store.exists():
        data = config.data
        write_store(store, format=data.format, size=data.size, counts={'train': 1, 'val': 1})
    (workdir / 'config.json').write_text(config.to_json())
    first = {'commit': 'c', 'versions': {'jax': '1'}, 'devices': ['d']}
    (workdir / 'run.json').write_text(json.dumps([first, {**first, 'commit': 'd'}, first]))
    (workdir / 'store.json').write_text(
        '{"source": "/a/b", "counts": {"train": 1, "val": 1}, "classes": 2}'
    )
    (workdir / 'metrics.jsonl').write_text('{"kind": "train", "step": 0}\n')
    return False


def leave_checkpoint(workdir, step=1, leaf=5):
    """Writes the metadata of a checkpoint of one array with this fingerprint -> the file."""
    content = {'meta': {}, 'leaves': {'params/a': {'fingerprint': leaf}}}
    file = workdir / f'checkpoints/{step}/meta/metadata'
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({**content, 'crc32': fingerprint.crc32(content)}))
    return file


def configured(command):
    """The config described by arguments of `alexnet_jax.main`; the last value of a field wins."""
    values = dict(argument.removeprefix('--').split('=', 1) for argument in command)
    config = configfile.load(values.pop('config'))
    values.pop('workdir')
    known = configfile.fields(config)
    changes = {
        name.removeprefix('config.'): text
        if isinstance(known[name], str)
        else ast.literal_eval(text)
        for name, text in values.items()
    }
    config.update_from_flattened_dict(changes)
    return config


def make(tmp_path, given=(), start=in_process, seeds=1, **others):
    """A Lab of smoke runs with all its files in a temporary folder."""
    return lab.Lab(
        'trial',
        'smoke',
        seeds=seeds,
        given=given,
        runs=tmp_path / 'runs',
        results=tmp_path / 'results',
        start=start,
        **others,
    )
