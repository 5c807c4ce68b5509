"""Networks by name: downloads that break, are damaged, or have no network, against a server of our own."""

import concurrent.futures
import contextlib
import email.message
import hashlib
import http.client
import json
import os
import shutil
import ssl
import subprocess
import sys
import types
import urllib.error
import urllib.request
import zipfile

import jax
import numpy as np
import pytest

import alexnet_jax
from alexnet_jax import hub as hub_command
from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError, install
from alexnet_jax.nets import network
from alexnet_jax.nets.build import build
from alexnet_jax.weights import bundle, hub, registry, safetensors, torch, variables
from alexnet_jax.weights.bundle import Bundle
from alexnet_jax.weights.registry import Entry
from tests.helpers import ROOT
from tests.helpers import web as webs
from tests.helpers.run_dirs import call
from tests.helpers.weight_files import pth_of, random_arrays, their_shapes

DATA = np.random.default_rng(0).bytes(100_000)
SHA = hashlib.sha256(DATA).hexdigest()
CHECK = 'sha256', SHA
NAME = 'someone/net'


@pytest.fixture
def web():
    with webs.serve() as web:
        web.files['/net.bin'] = DATA
        yield web


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    for name in ('ALEXNET_JAX_MIRROR', 'HF_ENDPOINT', 'HF_TOKEN', 'HF_HUB_OFFLINE'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HF_TOKEN_PATH', str(tmp_path / 'token'))
    monkeypatch.setenv('ALEXNET_JAX_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(hub, 'PAUSE', 0)
    monkeypatch.setattr(hub, 'CHUNK', 1000)
    return tmp_path / 'cache'


def files(cache):
    return (
        {path.name for path in cache.iterdir() if path.name != '.locks'}
        if cache.exists()
        else set()
    )


def get(web, checksum=CHECK, **more):
    return hub.download(NAME, f'{web.url}/net.bin', '.bin', checksum, **more)


def refused(call, *parts):
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert '\n' not in text
    for part in parts:
        assert part in text, text


def content(path):
    with open(path, 'rb') as file:
        return file.read()


def test_a_download_is_cached_by_its_hash(web, cache):
    for _ in range(2):
        assert content(get(web)) == DATA
    assert files(cache) == {f'someone-net-{SHA[:8]}.bin'} and len(web.log) == 1


@pytest.mark.parametrize(
    'checksum', [('sha256', SHA[:8]), ('sha1', hashlib.sha1(DATA).hexdigest()), None]
)
def test_other_checksums(web, cache, checksum):
    for _ in range(2):
        assert content(get(web, checksum)) == DATA
    assert files(cache) == {f'someone-net-{SHA[:8]}.bin'} and len(web.log) == 1


def test_a_truncated_download_is_named_kept_and_resumed(web, cache):
    web.cut = 40_000
    web.shift = 1  # so what follows the first part cannot be used
    refused(lambda: get(web), 'truncated: 40,000 of 100,000 bytes', 'resume')
    assert files(cache) == {f'someone-net-{SHA[:8]}.bin.part'}
    web.cut, web.shift, web.log = None, 0, []
    assert content(get(web)) == DATA
    assert [headers['Range'] for _, headers in web.log] == ['bytes=40000-']
    assert files(cache) == {f'someone-net-{SHA[:8]}.bin'}


def test_an_interrupted_download_goes_on_by_itself(web):
    web.cut = 9_000
    assert content(get(web)) == DATA
    assert [headers.get('Range') for _, headers in web.log][:3] == [
        None,
        'bytes=9000-',
        'bytes=18000-',
    ]
    assert len(web.log) == 12


def test_a_server_that_ignores_ranges(web, cache):
    cache.mkdir()
    (cache / f'someone-net-{SHA[:8]}.bin.part').write_bytes(DATA[:40_000])
    web.ranges = False
    assert content(get(web)) == DATA
    assert web.log[0][1]['Range'] == 'bytes=40000-'


def test_a_part_that_is_whole_already(web, cache):
    cache.mkdir()
    (cache / f'someone-net-{SHA[:8]}.bin.part').write_bytes(DATA)
    assert content(get(web)) == DATA


@pytest.mark.parametrize('part', [b'x' * 40_000, DATA + b'x'])
def test_a_part_of_another_file(web, cache, part):
    """The mismatch is detected at the end, and the next try starts over."""
    cache.mkdir()
    (cache / f'someone-net-{SHA[:8]}.bin.part').write_bytes(part)
    refused(lambda: get(web), 'SHA-256')
    assert files(cache) == set()
    assert content(get(web)) == DATA


def test_nothing_is_resumed_without_a_checksum(web, cache):
    cache.mkdir()
    (cache / 'someone-net.bin.part').write_bytes(b'x' * 40_000)
    assert content(get(web, None)) == DATA
    assert 'Range' not in web.log[0][1]
    web.files['/net.bin'], web.cut = DATA[:-1], 40_000
    refused(
        lambda: hub.download('b', f'{web.url}/net.bin', '.bin', None), 'truncated', 'run this again'
    )
    web.cut, web.sized = 40_000, False
    size = {'size': 100_000}
    refused(
        lambda: hub.download('b', f'{web.url}/net.bin', '.bin', None, **size), '40,000 of 100,000'
    )
    assert not [name for name in files(cache) if name.startswith('b-')]


@pytest.mark.parametrize('sized', [True, False])
def test_a_file_with_another_hash_is_never_used(web, cache, sized):
    web.files['/net.bin'], web.sized = DATA[:-1] + b'x', sized
    refused(lambda: get(web), 'SHA-256', SHA, 'removed')
    assert files(cache) == set()
    web.files['/net.bin'] = DATA[:44_000]  # what a proxy gave, pytorch/vision#353
    refused(lambda: get(web, size=100_000), 'truncated: 44,000 of 100,000 bytes', 'SHA-256')
    assert files(cache) == set()


def test_errors_of_servers(web, cache):
    web.fails = [503, 429, 500]
    assert content(get(web)) == DATA
    refused(lambda: hub.download('b', f'{web.url}/none', '.bin', CHECK), 'HTTP 404')
    web.fails = [503] * hub.TRIES
    refused(lambda: hub.download('b', f'{web.url}/net.bin', '.bin', CHECK), 'HTTP 503', 'cache')


@pytest.mark.parametrize('error', [ssl.SSLEOFError(8, 'EOF'), OSError(113, 'No route to host')])
def test_a_connection_that_breaks_in_any_way(web, monkeypatch, error):
    real, errors = http.client.HTTPResponse.read, [error]

    def read(self, *amount):
        if errors and self.length < 60_000:
            raise errors.pop()
        return real(self, *amount)

    monkeypatch.setattr(http.client.HTTPResponse, 'read', read)
    assert content(get(web)) == DATA
    assert [headers.get('Range') for _, headers in web.log] == [None, 'bytes=41000-']


def test_a_full_disk_is_not_the_network(web, monkeypatch):
    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(hub, 'open', full, raising=False)
    monkeypatch.setattr(hub, '_locked', lambda path: contextlib.nullcontext())
    with pytest.raises(OSError, match='No space'):
        get(web)


def test_a_file_of_any_size(web, cache):
    url = f'{web.url}/net.bin'
    for web.sized in (True, False):
        refused(lambda: hub._fetch(url, str(cache), 'net', most=99_999), 'more than 99,999 bytes')
    hub._fetch(url, str(cache), 'net', most=100_000)


def test_two_urls_with_the_same_end(web, cache):
    """A partial download of one is not mistaken for the other's."""
    web.files['/a/net.bin'], web.files['/b/net.bin'] = DATA, DATA[::-1]
    web.cut, web.shift = 40_000, 1
    refused(lambda: hub.download('url-net', f'{web.url}/a/net.bin', '.bin', CHECK), 'truncated')
    web.cut = None
    other = 'sha256', hashlib.sha256(DATA[::-1]).hexdigest()
    assert content(hub.download('url-net', f'{web.url}/b/net.bin', '.bin', other)) == DATA[::-1]
    assert f'url-net-{SHA[:8]}.bin.part' in files(cache)


@pytest.mark.parametrize('checksum', [CHECK, None])
def test_a_damaged_file_in_the_cache_is_downloaded_again(web, checksum):
    with open(get(web, checksum), 'r+b') as file:
        file.write(b'x' * 9)
    assert content(get(web, checksum)) == DATA and len(web.log) == 2


@pytest.mark.parametrize(
    ('url', 'words'),
    [
        ('http://[::1/x', 'not a valid web address'),
        ('http://host:x/y', 'not a valid web address'),
        ('http:///y', 'not a valid web address (no host)'),
        ('http://127.0.0.1:9/é ü\n.bin', 'cannot be reached ([Errno 111] Connection refused)'),
    ],
)
def test_addresses(url, words):
    refused(lambda: hub.locate(f'{url}#sha256={SHA}'), words)


@pytest.mark.parametrize('variable', ['ALEXNET_JAX_MIRROR', 'HF_ENDPOINT'])
def test_servers_without_a_scheme(variable, monkeypatch):
    monkeypatch.setenv(variable, 'huggingface.co')
    name = 'hf://me/net' if variable == 'HF_ENDPOINT' else f'https://host/x.bin#sha256={SHA}'
    refused(lambda: hub.locate(name), f'{variable}=huggingface.co: must start with https://')


def test_redirects(web):
    web.moved = {'/net.bin': '/other.bin'}
    web.files['/other.bin'] = DATA
    assert content(get(web)) == DATA
    web.moved = {'/a': '/b', '/b': '/a'}
    refused(lambda: hub.download('b', f'{web.url}/a', '.bin', CHECK), 'HTTP 302')


@pytest.mark.parametrize(
    'target', ['http://example.org/x', 'ftp://example.org/x', 'file:///etc/passwd']
)
def test_no_redirects_to_what_is_not_https(target):
    request = urllib.request.Request('https://example.org/x')
    with pytest.raises(urllib.error.URLError, match='not https'):
        hub._Redirects().redirect_request(
            request, None, 302, 'Found', email.message.Message(), target
        )


def test_without_a_network_the_cache_is_listed(web, cache):
    url = 'http://127.0.0.1:9/net.bin'
    cache.mkdir()
    (cache / f'b-{SHA[:8]}.bin.part').write_bytes(DATA[:5000])
    refused(
        lambda: hub.download('b', url, '.bin', CHECK),
        'cannot be reached',
        'refused',
        f'quickstart (cache: {cache})',
    )
    get(web)
    assert content(hub.download(NAME, url, '.bin', CHECK)) == DATA


def test_two_at_once_download_once(web):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = {*pool.map(lambda _: get(web), range(8))}
    assert len(found) == 1 and len(web.log) == 1


def test_the_cache_cannot_be_written(web, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('ALEXNET_JAX_CACHE', str(tmp_path / 'file'))
    refused(lambda: get(web), 'cannot be written', 'ALEXNET_JAX_CACHE')


def test_where_the_cache_is(monkeypatch):
    monkeypatch.delenv('ALEXNET_JAX_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', '/somewhere')
    assert hub.cache() == '/somewhere/alexnet_jax'
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', '/home/me')
    assert hub.cache() == '/home/me/.cache/alexnet_jax'


# Whole networks


@pytest.fixture(scope='module')
def published():
    """A file as PyTorch's users publish it: SqueezeNet 1.1 with random weights."""
    net = build(classes=1000, **configfile.load('squeezenet:1.1').model)
    name, rng = torch.names(net), np.random.default_rng(0)
    state = {
        name(path): rng.normal(0, 0.05, variables.their_shape(net, path, shape)).astype(np.float32)
        for path, shape in variables.leaves(net).items()
    }
    return safetensors.encoded(state, {})


@pytest.fixture
def registered(web, published, monkeypatch):
    digest = hashlib.sha256(published).hexdigest()
    web.files['/host/net.safetensors'] = published
    entry = Entry(
        title='A network',
        url='https://host/net.safetensors',
        preset='squeezenet:1.1',
        size=len(published),
        license='MIT',
        checksum=('sha256', digest[:8]),
        published=registry.errors(60.0, 80.0),
        page='https://host',
    )
    monkeypatch.setitem(registry.ENTRIES, 'host/net', entry)
    monkeypatch.setenv('ALEXNET_JAX_MIRROR', f'{web.url}/')
    return digest


def test_a_registered_network(web, registered, cache, capsys, monkeypatch):
    classify = alexnet_jax.load('host/net', views='center')
    image = np.random.default_rng(0).integers(0, 256, (300, 260, 3), np.uint8)
    assert classify(image).shape == (1000,)
    assert classify.names[0] == 'n01440764' and classify.words[0] == 'tench'
    folder = f'host-net-{registered[:8]}'
    assert files(cache) == {folder, f'{folder}.safetensors'}
    card = bundle.read_config(cache / folder)[1]
    assert (card['sha256'], card['license'], card['title']) == (registered, 'MIT', 'A network')
    again = alexnet_jax.load(hub.locate('hub:host/net'), views='center')
    np.testing.assert_array_equal(again(image), classify(image))
    assert web.paths() == ['/host/net.safetensors']
    call(monkeypatch, hub_command, 'list')
    assert 'host/net' in (said := capsys.readouterr().out) and ' 40.0 ' in said
    call(monkeypatch, hub_command, 'info', 'host/net')
    assert 'top-1 error 40.00%, top-5 error 20.00%' in (said := capsys.readouterr().out)
    assert registered[:8] in said and str(cache / folder) in said


def test_a_file_that_cannot_be_converted(web, registered, cache, monkeypatch):
    entry = registry.ENTRIES['host/net']._replace(checksum=None, size=5)
    monkeypatch.setitem(registry.ENTRIES, 'host/net', entry)
    web.files['/host/net.safetensors'] = b'<html'
    refused(lambda: hub.locate('host/net'), 'not a .safetensors file')
    assert files(cache) == set()
    entry = entry._replace(url='https://host/net.h5')
    monkeypatch.setitem(registry.ENTRIES, 'host/net', entry)
    monkeypatch.setitem(sys.modules, 'h5py', None)
    web.log = []
    refused(lambda: hub.locate('host/net'), install('keras'))
    assert not web.log


def test_a_file_that_is_in_the_cache_but_unused(registered, cache, monkeypatch):
    entry = registry.ENTRIES['host/net']
    args = (entry.url, '.safetensors', entry.checksum)
    file = hub.download('host/net', *args)
    assert hub.here('host/net', entry) == file
    monkeypatch.delenv('ALEXNET_JAX_MIRROR')
    refused(lambda: hub.download('b', 'http://127.0.0.1:9/b', '.bin', CHECK), ', host/net (cache:')
    folder = hub.locate('host/net')
    assert hub.here('host/net', entry) == folder != file


@pytest.mark.parametrize('damage', ['lost', 'changed', 'older', 'no config'])
def test_a_damaged_bundle_in_the_cache(web, registered, cache, monkeypatch, capsys, damage):
    folder = cache / f'host-net-{registered[:8]}'
    assert hub.locate('host/net') == str(folder)
    weights, config = folder / 'model.safetensors', folder / 'config.json'
    whole = bundle.read(folder).card
    if damage == 'lost':
        weights.unlink()
    elif damage == 'changed':
        weights.write_bytes(b'x' + weights.read_bytes()[1:])
    elif damage == 'no config':
        config.write_text('{}')
    else:
        config.write_text(config.read_text().replace('"converter": 1', '"converter": 0'))
    if damage == 'changed':  # detected only on reading
        call(monkeypatch, hub_command, 'download', 'host/net')
        assert capsys.readouterr().out == f'{folder}\n'
    assert hub.locate('host/net') == str(folder)
    assert bundle.read(folder).card == whole and len(web.log) == 1


def test_a_file_on_the_web(web, published, cache, monkeypatch):
    web.files['/a/my%20net.safetensors'] = published
    digest = hashlib.sha256(published).hexdigest()
    url = f'{web.url}/a/my%20net.safetensors'
    folder = hub.locate(f'{url}#sha256={digest}')
    assert folder == str(cache / f'url-my-20net-{digest[:8]}')
    assert hub.locate(f'{url}#sha256={digest.upper()}') == folder and len(web.log) == 1
    wrong = digest[:8] + '0' * 56
    refused(lambda: hub.locate(f'{url}#sha256={wrong}'), 'SHA-256')
    assert hub.locate(f'{url}#sha256={digest}') == folder
    web.files['/b/weights'] = pth_of({'a': np.zeros(3, np.float32)})  # by its content, a .pth
    digest = hashlib.sha256(web.files['/b/weights']).hexdigest()
    refused(lambda: hub.locate(f'{web.url}/b/weights#sha256={digest}'), 'weights', 'it lacks ')
    refused(lambda: hub.locate(f'{web.url}/b/weights#sha256={digest}'), f'{digest[:8]}.bin')
    assert web.paths().count('/b/weights') == 1
    for fragment in ('', '#', '#sha256=', '#sha256=1234', '#md5=' + '0' * 64):
        refused(lambda f=fragment: hub.locate(url + f), '#sha256=')


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.locate('nowhere') == 'nowhere'  # a path: whatever opens it says what is wrong
    refused(lambda: hub.locate('hub:torchvision/alexnt'), 'did you mean torchvision/alexnet')
    refused(lambda: hub.locate('hub:'), 'no network of this name')
    (tmp_path / 'squeezenet').mkdir()
    (tmp_path / 'squeezenet' / 'config.json').write_text('{}')
    assert hub.locate('squeezenet') == 'squeezenet'
    refused(lambda: alexnet_jax.load('nowhere'), 'not a run directory', 'alexnet_jax.hub lists')
    close = 'squeeznet: neither a run directory nor a registered network (did you mean squeezenet'
    for action in (
        lambda: alexnet_jax.load('squeeznet'),
        lambda: call(monkeypatch, hub_command, 'download', 'squeeznet'),
        lambda: call(monkeypatch, hub_command, 'info', 'squeeznet'),
    ):
        refused(action, close)
    for action in ('info', 'download'):
        refused(lambda a=action: call(monkeypatch, hub_command, a, 'nope'), 'nope: not a bundle')
    for text in ('hf://', 'hf://a', 'hf://a/b/c', 'hf://a/b@', 'hf://a/../b'):
        refused(lambda t=text: hub.locate(t), 'hf://USER/REPO')


def test_every_entry_is_sound():
    for name, entry in registry.ENTRIES.items():
        config = configfile.load(entry.preset)
        assert config.model.net and entry.url.startswith('http') and entry.license and entry.title
        if entry.checksum:
            kind, digits = entry.checksum
            assert len(digits) == {'sha1': 40, 'sha256': 64}[kind] or name.startswith(
                'torchvision/'
            )
            assert len(digits) >= 8 and int(digits, 16) >= 0
        assert 0 < entry.published['top1_error'] < 100


# The networks that come with the program


@pytest.mark.parametrize('name', [name for name in hub.names() if name not in registry.ENTRIES])
def test_our_own(name):
    found = bundle.read(hub.locate(name))
    assert {'title', 'license', 'data', 'measured', 'made'} <= {*found.card}
    size = sum((hub.OWN / name / file).stat().length for file in bundle.files(hub.OWN / name))
    assert size <= 4e6
    net = build(classes=len(found.names), **found.config['model'])
    shapes = jax.tree.map(lambda x: x.shape, network.shapes(net, found.config['augment']['crop']))
    assert jax.tree.map(np.shape, found.variables) == shapes
    assert (hub.OWN / name / bundle.CARD).read_text() == bundle.card(found)


def test_all_of_our_own_are_small():
    assert sum(file.stat().length for file in hub.OWN.glob('*/*')) <= 10e6


# The Hugging Face Hub


def small_bundle(seed=0):
    config = configfile.load('quickstart')
    config.update_from_flattened_dict({'model.width': 0.0625})
    net = build(classes=3, **config.model)
    rng = np.random.default_rng(seed)
    arrays = jax.tree.map(
        lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), network.shapes(net, 112)
    )
    plain = json.loads(json.dumps(config.to_dict()))
    return Bundle(plain, arrays, ['a', 'b', 'c'], np.full((128, 128, 3), 100, np.float32), {})


def upload(web, found, revision='main'):
    for name, data in bundle.encoded(found).items():
        web.files[f'/me/net/resolve/{revision}/{name}'] = data


@pytest.fixture
def hugging_face(web, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', web.url)
    upload(web, small_bundle())
    return web


def test_a_repository(hugging_face, cache, monkeypatch):
    first = hub.locate('hf://me/net')
    assert bundle.read(first).names == ['a', 'b', 'c']
    assert hub.locate('hf://me/net') == first
    assert hugging_face.paths()[-1] == '/me/net/resolve/main/config.json'  # is it still the same?
    assert len(hugging_face.log) == 5
    upload(hugging_face, small_bundle(1))
    second = hub.locate('hf://me/net')
    assert second != first
    upload(hugging_face, small_bundle(), revision='v%2F1')
    assert hub.locate('hf://me/net@v/1') not in (first, second)
    assert not [name for name in files(cache) if name.endswith('.part')]
    monkeypatch.setenv('HF_HUB_OFFLINE', 'Yes')
    assert hub.locate('hf://me/net') == second
    refused(lambda: hub.locate('hf://me/other'), 'HF_HUB_OFFLINE', 'hf-me--net@main')
    monkeypatch.delenv('HF_HUB_OFFLINE')
    hugging_face.log, hugging_face.fails = [], [503] * 5
    assert hub.locate('hf://me/net') == second and len(hugging_face.log) == 1
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    assert hub.locate('hf://me/net') == second


def test_a_commit_and_a_cache_that_cannot_be_written(hugging_face, cache, monkeypatch):
    commit = '0123456789' * 4
    upload(hugging_face, small_bundle(), revision=commit)
    found, main = hub.locate(f'hf://me/net@{commit}'), hub.locate('hf://me/net')

    def unwritable(path):
        raise AssertionError(path)

    monkeypatch.setattr(hub, '_locked', unwritable)
    assert hub.locate('hf://me/net') == main
    hugging_face.log = []
    assert hub.locate(f'hf://me/net@{commit}') == found and not hugging_face.log


def test_a_repository_whose_cached_bundle_lost_a_file(hugging_face, cache):
    folder = hub.locate('hf://me/net')
    os.unlink(os.path.join(folder, 'model.safetensors'))
    assert hub.locate('hf://me/net') == folder and bundle.is_bundle(folder)


@pytest.mark.parametrize('name', ['config.json', 'README.md'])
def test_a_repository_with_an_enormous_file(hugging_face, name):
    hugging_face.files[f'/me/net/resolve/main/{name}'] = bytes(hub.SMALL + 1)
    refused(lambda: hub.locate('hf://me/net'), name, 'more than 1,048,576 bytes')


def test_a_repository_that_breaks_off(hugging_face, cache):
    hugging_face.cut, hugging_face.shift = 20_000, 1
    refused(lambda: hub.locate('hf://me/net'), 'truncated: 20,000 of')
    hugging_face.cut, hugging_face.shift, hugging_face.log = None, 0, []
    assert bundle.is_bundle(hub.locate('hf://me/net'))
    ranges = {path.rpartition('/')[2]: headers.get('Range') for path, headers in hugging_face.log}
    assert ranges['model.safetensors'] == 'bytes=20000-'


def test_a_repository_with_other_weights(hugging_face, cache):
    key = '/me/net/resolve/main/model.safetensors'
    hugging_face.files[key] = hugging_face.files[key][:-1] + b'x'
    refused(lambda: hub.locate('hf://me/net'), 'SHA-256')
    assert not hub.cached('hf-me--net@main')
    hugging_face.files['/me/net/resolve/main/config.json'] = b'{"model_type": "bert"}'
    refused(lambda: hub.locate('hf://me/net'), 'no alexnet_jax bundle')
    refused(lambda: hub.locate('hf://me/none'), 'HTTP 404')


def test_the_token_is_for_one_server(hugging_face, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'sec\nret')
    with pytest.raises(UserError, match='HF_TOKEN: has characters') as error:
        hub.locate('hf://me/net')
    assert 'ret' not in str(error.value)
    monkeypatch.setenv('HF_TOKEN', 'secret\n')
    key = '/me/net/resolve/main/model.safetensors'
    with webs.serve() as other:
        other.files['/blob'] = hugging_face.files.pop(key)
        hugging_face.moved = {key: '/here', '/here': f'{other.url}/blob'}
        hub.locate('hf://me/net')
        assert 'Authorization' not in other.log[0][1]
    sent = [headers.get('Authorization') for _, headers in hugging_face.log]
    assert sent == ['Bearer secret'] * len(sent)


def test_where_the_token_is(hugging_face, tmp_path, monkeypatch):
    """In HF_TOKEN or, as huggingface_hub has it, in a file."""
    monkeypatch.setenv('HOME', str(tmp_path))
    for variable in ('HF_TOKEN_PATH', 'HF_HOME', 'XDG_CACHE_HOME'):
        monkeypatch.delenv(variable, raising=False)

    def sent():
        hugging_face.log.clear()
        hub.locate('hf://me/net')
        return hugging_face.log[0][1].get('Authorization')

    assert sent() is None
    for name, variable, value in (
        ('.cache/huggingface/token', '', ''),
        ('xdg/huggingface/token', 'XDG_CACHE_HOME', f'{tmp_path}/xdg'),
        ('home/token', 'HF_HOME', '~/home'),
        ('mine', 'HF_TOKEN_PATH', f'{tmp_path}/mine'),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'{name}\n')
        if variable:
            monkeypatch.setenv(variable, value)
        assert sent() == f'Bearer {name}'
    monkeypatch.setenv('HF_TOKEN', 'first')
    assert sent() == 'Bearer first'
    monkeypatch.delenv('HF_TOKEN')
    (tmp_path / 'mine').write_bytes(b'sec\xffret')
    refused(lambda: hub.locate('hf://me/net'), f'{tmp_path}/mine: has characters')


def test_progress_is_shown_in_notebooks(web, cache, monkeypatch, capsys):
    for kernel in (False, True):
        if kernel:
            monkeypatch.setitem(sys.modules, 'ipykernel', types.ModuleType('ipykernel'))
        get(web)
        assert (NAME in capsys.readouterr().err) == kernel
        for file in cache.glob('*.bin'):
            file.unlink()


def test_info_on_a_compressed_network(tmp_path, monkeypatch, capsys):
    facts = {'times': 28.94, 'kept': 11.06, 'settings': {'rounds': 3}}
    found = small_bundle()
    found = found._replace(card={**found.card, 'compression': facts})
    bundle.write(tmp_path / 'a', found, compress=True)
    call(monkeypatch, hub_command, 'info', tmp_path / 'a')
    text = '28.9 times smaller; 11.1% of the weights are left'
    assert f'compression {text}\n' in capsys.readouterr().out
    assert text in (tmp_path / 'a' / bundle.CARD).read_text()


@pytest.mark.parametrize('compress', [False, True])
def test_push(tmp_path, monkeypatch, capsys, compress):
    done = []

    class HfApi:
        def create_repo(self, name, **more):
            done.append((name, more))

        def upload_folder(self, *, repo_id, folder_path, allow_patterns, **more):
            done.append((repo_id, bundle.read(folder_path)))
            assert {*allow_patterns} == {*os.listdir(folder_path)}
            assert ('model.compressed' in allow_patterns) == compress

    bundle.write(tmp_path / 'a', small_bundle(), compress=compress)
    push = ('push', tmp_path / 'a', 'hf://me/net', '--title=Mine', '--private')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    refused(lambda: call(monkeypatch, hub_command, *push), install('hub'))
    monkeypatch.setitem(sys.modules, 'huggingface_hub', types.SimpleNamespace(HfApi=HfApi))
    refused(lambda: call(monkeypatch, hub_command, 'push', 'x', 'me/net'), 'hf://USER/REPO')
    refused(lambda: call(monkeypatch, hub_command, 'push', 'x'), 'push RUN hf://USER/REPO')
    refused(lambda: call(monkeypatch, hub_command, 'list', 'x'), 'hub list')
    refused(lambda: call(monkeypatch, hub_command, 'pull'), "invalid choice: 'pull'")
    call(monkeypatch, hub_command, *push)
    (created, uploaded) = done
    assert created == ('me/net', {'private': True, 'exist_ok': True})
    assert uploaded[0] == 'me/net' and uploaded[1].card['title'] == 'Mine'
    expected = small_bundle().variables
    jax.tree.map(np.testing.assert_array_equal, uploaded[1].variables, expected)
    monkeypatch.setattr(HfApi, 'create_repo', lambda *_, **__: 1 / 0)
    refused(lambda: call(monkeypatch, hub_command, *push), 'cannot be written', 'hf auth login')


# The wheel

LOADS = """
import sys
import numpy as np
import alexnet_jax

print(alexnet_jax.__file__)
for name in sys.argv[1:]:
    classify = alexnet_jax.load(name, views='center')
    probabilities = classify(np.zeros((99, 80, 3), np.uint8))
    print(len(classify.words), classify.words[0], f'{probabilities.sum():.3f}')
"""


@pytest.mark.full
def test_the_wheel(web, tmp_path):
    """Installed away from the repository, it loads a network of our own and one from the web."""
    source, site = tmp_path / 'source', tmp_path / 'site'
    for name in ('alexnet_jax', 'configs'):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('pyproject.toml', 'README.md', 'LICENSE', 'requirements.txt'):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', f'--wheel-dir={tmp_path}', source]
    made = subprocess.run(pip, capture_output=True, text=True, timeout=200)
    if 'Could not find a version' in made.stderr:
        pytest.skip('needs the build system of pyproject.toml, or a network to get it')
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob('alexnet_jax-*.whl')
    shutil.rmtree(source)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    net = variables.preset('squeezenet:1.1', 1000, {})
    shapes = their_shapes(net, torch.names(net), 224)
    web.files['/net.pth'] = pth_of(random_arrays(shapes))
    digest = hashlib.sha256(web.files['/net.pth']).hexdigest()
    done = subprocess.run(
        [sys.executable, '-c', LOADS, 'quickstart', f'{web.url}/net.pth#sha256={digest}'],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(site), 'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    expected = [f'{site}/alexnet_jax/__init__.py', '10 arrow 1.000', '1000 tench 1.000']
    assert done.stdout.splitlines() == expected
