"""Bundles and .safetensors files: written and read back; damaged and malicious ones are refused."""

import hashlib
import json
import re
import struct

import jax.numpy as jnp
import numpy as np
import pytest

import alexnet_jax
from alexnet_jax.common.errors import UserError
from alexnet_jax.rundir import fingerprint
from alexnet_jax.weights import bundle, safetensors
from alexnet_jax.weights.bundle import Bundle
from configs import quickstart
from tests.helpers import buckets
from tests.helpers.weight_files import EVIL, SHOWN


def made(**changes):
    rng = np.random.default_rng(0)
    config = quickstart.get_config()
    config.update_from_flattened_dict({'data.size': 8, 'augment.crop': 6})
    layer = {'kernel': rng.normal(size=(3, 3, 3, 4)).astype(np.float32), 'bias': np.zeros(4)}
    whole = Bundle(
        config=json.loads(json.dumps(config.to_dict())),
        variables={'params': {'conv1': layer}, 'batch_stats': {}},
        names=['a', 'b c', 'ü'],
        mean=rng.uniform(0, 255, (8, 8, 3)).astype(np.float32),
        card={
            'title': 'A network',
            'license': 'MIT',
            'measured': {'top1_error': 12.5, 'on': 'val'},
        },
    )
    return whole._replace(**changes)


def assert_same(found, expected):
    assert found._replace(variables=0, mean=0) == expected._replace(variables=0, mean=0)
    np.testing.assert_array_equal(found.mean, expected.mean)
    leaves = [fingerprint.named_leaves(x.variables) for x in (found, expected)]
    assert {n: x.dtype for n, x in leaves[0].items()} == {n: x.dtype for n, x in leaves[1].items()}
    for name, x in leaves[0].items():
        np.testing.assert_array_equal(x, leaves[1][name])


def test_written_and_read_back(tmp_path):
    expected = made()
    bundle.write(tmp_path / 'a', expected)
    assert bundle.is_bundle(tmp_path / 'a') and not bundle.is_bundle(tmp_path)
    assert_same(bundle.read(tmp_path / 'a'), expected)
    assert [*tmp_path.iterdir()] == [tmp_path / 'a']
    card = (tmp_path / 'a' / 'README.md').read_text()
    assert '# A network' in card and 'top-1 error 12.50% (val)' in card and '"value": 0.875' in card
    with pytest.raises(UserError, match='exists'):
        bundle.write(tmp_path / 'a', expected)


def test_a_constant_mean_is_one_pixel(tmp_path):
    expected = made(mean=np.broadcast_to(np.float32([1, 2, 3]), (8, 8, 3)))
    bundle.write(tmp_path / 'a', expected)
    assert safetensors.read(str(tmp_path / 'a' / 'model.safetensors'))[0]['mean'].shape == (1, 1, 3)
    assert_same(bundle.read(tmp_path / 'a'), expected)


def test_the_mean_in_the_card_is_that_of_many_pixels(tmp_path):
    found = made(mean=np.full((256, 256, 3), 123.675, np.float32))
    found.config['data']['size'] = 256
    assert '(123.7, 123.7, 123.7 on average)' in bundle.card(found)


def test_a_bundle_in_a_bucket():
    with buckets.mounted(buckets.Bucket()):
        bundle.write('gs://bucket/a', made())
        assert_same(bundle.read('gs://bucket/a'), made())
        with pytest.raises(UserError, match='gs://bucket/a: exists and is not an empty folder'):
            bundle.write('gs://bucket/a', made())


def test_where_no_folder_can_be_made(tmp_path):
    (tmp_path / 'file').touch()
    for check in (bundle.check_new, lambda folder: bundle.write(folder, made())):
        with pytest.raises(UserError, match='cannot be written .*give another folder'):
            check(tmp_path / 'file' / 'a')
    bundle.check_new(tmp_path / 'b' / 'c')
    assert [*tmp_path.iterdir()] == [tmp_path / 'file']


def test_nothing_is_left_of_a_bundle_that_cannot_be_written(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(bundle.paths, 'replace', full)
    with pytest.raises(UserError, match='disk full'):
        bundle.write(tmp_path / 'a', made())
    assert [*tmp_path.iterdir()] == []


def _edit_config(folder, change):
    file = folder / 'config.json'
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def _replace(folder, name, content):
    """Replaces a file and its checksum, as an attacker could."""
    (folder / name).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    _edit_config(folder, lambda c: c['bundle']['sha256'].update({name: digest}))


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda f: (f / 'names.txt').unlink(), 'No such file'),
        (lambda f: (f / 'names.txt').write_bytes(b'a\nb\n'), 'names.txt does not have the SHA-256'),
        (lambda f: _replace(f, 'names.txt', b'\xff\n'), 'UnicodeDecodeError'),
        (lambda f: _replace(f, 'names.txt', b'a\n\x1b\n'), 'control character'),
        (lambda f: _replace(f, 'model.safetensors', b'{}'), 'not a .safetensors'),
        (lambda f: _replace(f, 'model.safetensors', safetensors.encoded({}, {})), 'no mean image'),
        (lambda f: (f / 'config.json').write_text('[' * 200_000), 'nested|JSON'),
        (lambda f: (f / 'config.json').write_text('{}'), 'bundle'),
        (lambda f: (f / 'model.safetensors').write_bytes(b'\0' * 9), 'SHA-256'),
        (lambda f: _edit_config(f, lambda c: c['data'].update(size=9)), 'no mean image'),
        (lambda f: _edit_config(f, lambda c: c['data'].update(size=10**9)), 'wrong type'),
        (lambda f: _edit_config(f, lambda c: c['bundle'].update(format=2)), 'update alexnet_jax'),
        *(
            (
                lambda f, x=card: _edit_config(f, lambda c: c['bundle'].update(card=x)),
                'wrong type',
            )
            for card in (
                {'measured': 5},
                {'published': {'top1_error': '5'}},
                {'measured': {'top5_error': 1e999}},
                {'measured': {'on': ['x']}},
                {'title': {'a': 1}},
                {'compression': {'kept': 5}},
            )
        ),
    ],
)
def test_damaged_bundles(tmp_path, damage, message):
    bundle.write(tmp_path / 'a', made())
    damage(tmp_path / 'a')
    with pytest.raises(UserError, match=message) as error:
        bundle.read(tmp_path / 'a')
    assert str(error.value).isprintable() and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda c: c['model'].update(net=['a']), 'config.model.net='),
        (lambda c: c['model'].update(net={'a': 1}), 'config.model.net='),
        (lambda c: c['model'].update(width='x'), 'config.model.width='),
        (lambda c: c['model'].update(more=1), 'more'),
        (lambda c: c['model'].update({EVIL: 1}), re.escape(SHOWN)),
        (lambda c: c['augment'].update(crop=1), 'config.augment.crop=1: nothing is left'),
    ],
)
def test_networks_that_cannot_be_made(tmp_path, change, message):
    bundle.write(tmp_path / 'a', made())
    _edit_config(tmp_path / 'a', change)
    with pytest.raises(UserError, match=message) as error:
        alexnet_jax.load(tmp_path / 'a')
    assert str(error.value).isprintable() and str(error.value).startswith(str(tmp_path / 'a'))


def test_safetensors_of_every_type(tmp_path):
    file = str(tmp_path / 'a.safetensors')
    arrays = {str(d): np.arange(6).reshape(2, 3).astype(d) for d in safetensors.DTYPES.values()}
    arrays |= {'scalar': np.float32(3).reshape(()), 'empty': np.zeros((2, 0), np.float32)}
    arrays['transposed'] = arrays['float32'].T
    safetensors.write(file, arrays, {'a': 'b'})
    found, metadata = safetensors.read(file)
    assert metadata == {'a': 'b'} and {*found} == {*arrays}
    for name, x in arrays.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape)
        np.testing.assert_array_equal(found[name], x)
    assert found['bfloat16'].dtype == jnp.bfloat16


def test_the_reference_implementation_agrees(tmp_path):
    reference = pytest.importorskip('safetensors.numpy', reason='needs safetensors')
    file = str(tmp_path / 'a.safetensors')
    arrays = {'a': np.arange(6, dtype=np.float32).reshape(2, 3), 'b': np.arange(3, dtype=np.uint8)}
    safetensors.write(file, arrays, {'x': 'y'})
    for name, x in reference.load_file(file).items():
        np.testing.assert_array_equal(x, arrays[name])
    reference.save_file(arrays, file, {'x': 'y'})
    found, metadata = safetensors.read(file)
    assert metadata == {'x': 'y'} and all((found[name] == x).all() for name, x in arrays.items())


def _file(header, data=b'\0' * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(text) if length is None else length) + text + data


def _entry(first=0, last=8, dtype='F32', shape=(2,)):
    return {'dtype': dtype, 'shape': [*shape], 'data_offsets': [first, last]}


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'length'),
        (_file({}, b'', length=2**63), 'length'),
        (_file({}, b'', length=10**6), 'truncated'),
        (_file(b'\xff\xff'), 'JSON'),
        (_file(b'{"a": ' * 100_000), 'JSON'),
        (_file(b'[' * 100_000 + b']' * 100_000), 'JSON'),
        (_file(b'{"a": ' + b'9' * 5000 + b'}'), 'JSON'),
        (_file(b'{"a": 1, "a": 2}'), 'JSON'),
        (_file([]), 'table'),
        (_file({'__metadata__': {'a': 1}}), 'table'),
        (_file({'a': 1}), 'describes a wrongly'),
        (_file({'a': _entry(dtype='F99')}), 'describes a wrongly'),
        (_file({EVIL: 1}), f'describes {re.escape(SHOWN)} wrongly'),
        (_file({EVIL: _entry(shape=(3,))}), f'{re.escape(SHOWN)} does not begin'),
        (_file({'a': _entry(dtype=['F32'])}), 'describes a wrongly'),
        (_file({'a': _entry(shape=(-2, -1))}), 'describes a wrongly'),
        (_file({'a': _entry(shape=(2.0,))}), 'describes a wrongly'),
        (_file({'a': _entry(shape=(True, 2))}), 'describes a wrongly'),
        (_file({'a': _entry(first=-8, last=0)}), 'describes a wrongly'),
        (_file({'a': _entry(shape=(3,))}), 'shape and neighbors'),
        (_file({'a': _entry(shape=(2**62, 2**62))}), 'shape and neighbors'),
        (_file({'a': _entry(), 'b': _entry()}), 'shape and neighbors'),  # overlap
        (_file({'a': _entry(4, 12)}, b'\0' * 12), 'shape and neighbors'),  # a hole
        (_file({'a': _entry(8, 0)}), 'shape and neighbors'),
        (_file({'a': _entry(0, 800, shape=(200,))}), 'truncated: '),
        (_file({'a': _entry()}, b'\0' * 9), 'too many'),
        (_file({'a': _entry(0, 0, shape=(0, 2**62, 2**62))}, b''), 'too large'),
    ],
)
def test_malicious_headers(tmp_path, content, message):
    file = tmp_path / 'a.safetensors'
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        safetensors.read(str(file))
    assert str(error.value).isprintable() and len(str(error.value)) < 300
