"""Networks by name: registered ones, files on the web, and repositories of the Hugging Face Hub.

Downloads are kept in a cache: the published file as NAME-XXXXXXXX.EXT, with the first digits of its
SHA-256, and the bundle made of it as NAME-XXXXXXXX. Environment variables:

    ALEXNET_JAX_CACHE     the cache; default: alexnet_jax in $XDG_CACHE_HOME or ~/.cache
    ALEXNET_JAX_MIRROR    a server that has https://HOST/PATH as MIRROR/HOST/PATH
    HF_ENDPOINT, HF_TOKEN the Hugging Face Hub and an access token; HF_HUB_OFFLINE=1: only the cache
"""

import contextlib
import difflib
import fcntl
import glob
import hashlib
import http.client
import os
import re
import shutil
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

from tqdm import tqdm

from alexnet_jax.common import paths
from alexnet_jax.common.errors import UserError, one_line, reason, say
from alexnet_jax.weights import bundle, readers
from alexnet_jax.weights.registry import ENTRIES, Entry
from alexnet_jax.weights.variables import Options

OWN = paths.Path(__file__).parent / 'bundles'  # networks that come with this program
PREFIX = 'hub:'
TRIES, PAUSE = 5, 1.0  # attempts without progress, and seconds between them
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 20  # bytes
SHOWN = 8  # hex digits of a SHA-256 in the name of a file


def locate(name: str | os.PathLike) -> str:
    """Returns the folder of a network: a run directory or a bundle, which is downloaded if need be.

    name: a folder; a name that `names` lists, 'hub:' may precede it; https://...#sha256=... (a file of
    weights); or hf://USER/REPO[@REVISION] (a bundle). A folder with a config.json comes before a
    registered name. Raises UserError for names that do not exist, and for failed downloads.
    """
    text = os.fspath(name)
    if text.startswith('hf://'):
        return _from_hugging_face(text)
    if re.match(r'https?://', text):
        return _from_url(text)
    known = text.removeprefix(PREFIX)
    if known not in names():
        if known == text:
            return text
        close = ', '.join(difflib.get_close_matches(known, names(), n=3, cutoff=0.4))
        raise UserError(
            f'{text}: no network of this name{f" (did you mean {close}?)" if close else ""}; '
            'python -m alexnet_jax.hub list shows all'
        )
    if known == text and (paths.path(text) / bundle.CONFIG).is_file():
        return text
    if known not in ENTRIES:
        return str(OWN / known)
    return _registered(known, ENTRIES[known])


def names() -> list[str]:
    """The registered names: first those that come with this program."""
    own = sorted(folder.name for folder in OWN.iterdir()) if OWN.is_dir() else []
    return [name for name in own if bundle.is_bundle(OWN / name)] + [*ENTRIES]


def cache() -> str:
    """The folder of downloads."""
    home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return os.environ.get('ALEXNET_JAX_CACHE') or os.path.join(home, 'alexnet_jax')


def cached(name: str, checksum: tuple[str, str] | None = None, ext: str = '') -> str | None:
    """The file or, without `ext`, the bundle of a name in the cache; None if it is not there."""
    digits = checksum[1][:SHOWN] if checksum and checksum[0] == 'sha256' else ''
    pattern = glob.escape(os.path.join(cache(), f'{_plain(name)}-{digits}'))
    pattern += '[0-9a-f]' * (SHOWN - len(digits)) + ext
    found = [path for path in glob.glob(pattern) if ext or bundle.is_bundle(path)]
    return max(found, key=os.path.getmtime, default=None)


def _plain(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r'[^\w.@-]+', '-', name)


def _registered(name: str, entry: Entry) -> str:
    found = cached(name, entry.checksum)
    if found:
        return found
    ext = os.path.splitext(urllib.parse.urlsplit(entry.url).path)[1]
    file = download(name, entry.url, ext, entry.checksum, entry.size)
    return _converted(file, entry.checksum, facts(entry), entry.preset)


def facts(entry: Entry) -> dict:
    """What the card of a registered network says."""
    return {
        'title': entry.title,
        'source': entry.page,
        'url': entry.url,
        'licence': entry.licence,
        'data': 'ImageNet (ILSVRC-2012)',
        'published': entry.published,
        'measured': entry.measured,
    }


def _from_url(text: str) -> str:
    url, _, fragment = text.partition('#')
    match = re.fullmatch(r'sha256=([0-9a-fA-F]{64})', fragment)
    if not match:
        raise UserError(
            f'{text}: end it in #sha256= and the 64 digits of the SHA-256 of the file, to check it'
        )
    stem, ext = os.path.splitext(os.path.basename(urllib.parse.urlsplit(url).path))
    name, checksum = f'url-{stem[:100]}', ('sha256', match[1].lower())
    found = cached(name, checksum)
    if found and bundle.read_config(found)[1].get('sha256') == checksum[1]:
        return found
    file = download(name, url, ext, checksum)
    return _converted(file, checksum, {'url': url})


def _converted(file: str, checksum, facts: dict, preset: str = '') -> str:
    """Makes a bundle of a download -> its folder; a file that is no use and has no checksum is removed."""
    folder = os.path.splitext(file)[0]
    digest = _digest(file, 'sha256')
    with _locked(folder):
        if bundle.is_bundle(folder) and bundle.read_config(folder)[1].get('sha256') != digest:
            shutil.rmtree(folder)  # of another file whose hash begins like this one's
        if not bundle.is_bundle(folder):
            try:
                found = readers.read(file, Options(preset))
            except UserError:
                if checksum is None:
                    os.unlink(file)
                raise
            card = {**found.card, **facts, 'sha256': digest}
            bundle.write(folder, found._replace(card=card))
    return folder


def _from_hugging_face(text: str) -> str:
    match = re.fullmatch(r'hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?', text)
    if not match:
        raise UserError(f'{text}: the form is hf://USER/REPO or hf://USER/REPO@REVISION')
    repository, revision = match[1], match[2] or 'main'
    endpoint = (os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/')
    address = f'{endpoint}/{repository}/resolve/{urllib.parse.quote(revision, safe="")}'
    name = f'hf-{repository.replace("/", "--")}@{revision}'
    headers = {}
    if token := os.environ.get('HF_TOKEN'):
        headers['Authorization'] = f'Bearer {token}'
    with _locked(os.path.join(cache(), _plain(name))), tempfile.TemporaryDirectory() as temporary:
        file = os.path.join(temporary, bundle.CONFIG)
        try:
            if os.environ.get('HF_HUB_OFFLINE') in ('1', 'true', 'True', 'TRUE', 'YES', 'ON'):
                raise Unreachable(f'{text}: HF_HUB_OFFLINE is set')
            _fetch(f'{address}/{bundle.CONFIG}', file, text, headers=headers)
        except Unreachable as error:
            if not (found := cached(name)):
                raise _not_here(error) from None
            say(f'{error}: using {found}')
            return found
        try:
            sums = bundle.checksums(temporary)
        except UserError:
            raise UserError(f'{text}: this repository holds no bundle of alexnet_jax') from None
        folder = os.path.join(cache(), f'{_plain(name)}-{_digest(file, "sha256")[:SHOWN]}')
        if bundle.is_bundle(folder):
            return folder
        parts = f'{folder}.part'  # kept if the download stops, so that it can go on
        os.makedirs(parts, exist_ok=True)
        for part in bundle.files(temporary)[1:]:
            target, checksum = os.path.join(parts, part), sums.get(part)
            done = checksum and os.path.exists(target) and _digest(target, 'sha256') == checksum
            if not done:
                check = ('sha256', checksum) if checksum else None
                with _here():
                    _fetch(
                        f'{address}/{part}',
                        f'{target}.part',
                        f'{text}: {part}',
                        check,
                        headers=headers,
                    )
                os.replace(f'{target}.part', target)
        shutil.copy(file, os.path.join(parts, bundle.CONFIG))
        os.rename(parts, folder)
    return folder


class Unreachable(UserError):
    """No answer from a server."""


def _not_here(error: Unreachable) -> UserError:
    """The error for a download without a network: says what is in the cache."""
    known = [
        name for name in names() if name not in ENTRIES or cached(name, ENTRIES[name].checksum)
    ]
    folders = [path for path in glob.glob(os.path.join(cache(), '*')) if bundle.is_bundle(path)]
    others = [os.path.basename(path) for path in folders]
    there = [*known, *(name for name in others if name.startswith(('hf-', 'url-')))]
    return UserError(
        f'{error}; here without a network: {", ".join(there) or "nothing"} (cache: {cache()})'
    )


@contextlib.contextmanager
def _here():
    try:
        yield
    except Unreachable as error:
        raise _not_here(error) from None


def download(
    name: str, url: str, ext: str, checksum: tuple[str, str] | None, size: int | None = None
) -> str:
    """Returns the cached file of a name, which is downloaded first if it is not there.

    checksum: (algorithm, its first hex digits at least); size: in bytes, roughly. A download that was
    interrupted is resumed if there is a checksum to show that the parts fit. Raises UserError if the
    file cannot be reached, is truncated or is another one.
    """
    part = os.path.join(cache(), f'{_plain(name)}{ext}.part')
    with _locked(part):
        found = cached(name, checksum, ext)
        if found and (not checksum or _digest(found, checksum[0]).startswith(checksum[1])):
            return found
        with _here():
            _fetch(_mirrored(url), part, name, checksum, size)
        target = os.path.join(cache(), f'{_plain(name)}-{_digest(part, "sha256")[:SHOWN]}{ext}')
        os.replace(part, target)
    return target


def _mirrored(url: str) -> str:
    mirror = os.environ.get('ALEXNET_JAX_MIRROR')
    return f'{mirror.rstrip("/")}/{url.partition("://")[2]}' if mirror else url


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Keeps other processes of this host from making the same file; waits for one that does."""
    try:
        folder, name = os.path.split(path)
        os.makedirs(os.path.join(folder, '.locks'), exist_ok=True)
        file = open(os.path.join(folder, '.locks', name), 'w')
    except OSError as error:
        raise UserError(
            f'{os.path.dirname(path)}: cannot be written ({reason(error)}); set ALEXNET_JAX_CACHE to '
            'another folder'
        ) from error
    with file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        except OSError as error:
            raise UserError(
                f'{paths.full(error)}{os.path.dirname(path)}: cannot be written ({reason(error)})'
            ) from error


def _digest(file: str, algorithm: str) -> str:
    with open(file, 'rb') as opened:
        return hashlib.file_digest(opened, algorithm).hexdigest()


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to http, and sends the token only to the server it is for."""

    def redirect_request(self, request, response, code, message, headers, url):
        new = super().redirect_request(request, response, code, message, headers, url)
        old, target = (urllib.parse.urlsplit(x) for x in (request.full_url, url))
        if target.scheme not in ('http', 'https') or (old.scheme, target.scheme) == (
            'https',
            'http',
        ):
            raise urllib.error.URLError(f'redirects to {url}, which is not https')
        if new and old[:2] != target[:2]:
            new.remove_header('Authorization')
        return new


def _fetch(
    url: str,
    part: str,
    called: str,
    checksum: tuple[str, str] | None = None,
    size: int | None = None,
    headers: dict | None = None,
) -> None:
    """Downloads a file to `part`, from where it ends if there is a checksum.

    What was read stays there if the connection breaks; a file that is whole but wrong does not.
    """
    left, total, before = TRIES, None, _size(part)
    while True:
        start = _size(part)
        try:
            total = _rest(url, part, called, start if checksum else 0, headers or {})
            if total is None or _size(part) >= total:
                break
            why = 'the connection was closed'
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # there is nothing after what we have
                break
            if error.code < 500 and error.code != 429:
                hint = {401: '; HF_TOKEN may be missing', 403: '; HF_TOKEN may be missing'}
                raise UserError(
                    f'{called}: {url}: HTTP {error.code} {_text(error.reason)}{hint.get(error.code, "")}'
                ) from None
            why = f'HTTP {error.code} {_text(error.reason)}'
        except (
            urllib.error.URLError,
            http.client.HTTPException,
            TimeoutError,
            ConnectionError,
        ) as error:
            why = _text(getattr(error, 'reason', '')) or one_line(error)
        here = _size(part)
        left = TRIES if here > start and checksum else left - 1
        if not left:
            if here == before:
                raise Unreachable(f'{called}: {url} cannot be reached ({why})')
            of = f' of {total:,}' if total else ''
            kept = 'run this again to resume' if checksum else 'run this again'
            raise UserError(
                f'{called}: {url} is truncated: {here:,}{of} bytes arrived ({why}); {kept}'
            )
        time.sleep(PAUSE)
    _check(url, part, called, checksum, size)


def _size(file: str) -> int:
    return os.path.getsize(file) if os.path.exists(file) else 0


def _text(reason) -> str:
    """The reason that a server or a library gives, on one line."""
    return ' '.join(str(reason).split())[:200]


def _rest(url: str, part: str, called: str, start: int, headers: dict) -> int | None:
    """Appends the bytes from `start` on to a file -> the size of all, None if the server does not say."""
    request = urllib.request.Request(url, headers={'User-Agent': 'alexnet_jax', **headers})
    if start:
        request.add_header('Range', f'bytes={start}-')
    opener = urllib.request.build_opener(_Redirects)
    with opener.open(request, timeout=TIMEOUT) as response:
        place = re.match(r'bytes (\d+)-\d+/(\d+|\*)', response.headers.get('Content-Range', ''))
        resumed = response.status == 206 and place and int(place[1]) == start
        if response.status == 206 and not resumed:
            raise urllib.error.URLError('another part of the file than was asked for')
        start = start if resumed else 0
        length = response.headers.get('Content-Length')
        total = start + int(length) if length and length.isdigit() else None
        with (
            open(part, 'ab' if resumed else 'wb') as file,
            tqdm(
                desc=called, initial=start, total=total, unit='B', unit_scale=True, disable=None
            ) as bar,
        ):
            while data := response.read(CHUNK):
                file.write(data)
                bar.update(len(data))
    return total


def _check(url: str, part: str, called: str, checksum, size: int | None) -> None:
    """Raises UserError, and removes the file, unless it has its checksum."""
    here = _size(part)
    if checksum is None:
        if size is None or here == size:
            return
        problem = f'{here:,} bytes, not {size:,}'
    else:
        found = _digest(part, checksum[0])
        if found.startswith(checksum[1]):
            return
        kind = {'sha1': 'SHA-1', 'sha256': 'SHA-256'}[checksum[0]]
        problem = f'its {kind} is {found}, and should be {checksum[1]}'
    os.unlink(part)
    short = f'truncated: {here:,} of {size:,} bytes; ' if size and here < 0.999 * size else ''
    raise UserError(
        f'{called}: {url}: {short}{problem}: removed; try again, and if it stays so, the file has been '
        'replaced or something on the way changes it'
    )


def check_target(target: str) -> str:
    """hf://USER/REPO -> USER/REPO. Raises UserError for another form, or without huggingface_hub."""
    match = re.fullmatch(r'hf://([\w.-]+/[\w.-]+)', target)
    if not match:
        raise UserError(f'{target}: the form is hf://USER/REPO')
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise UserError(f"{target}: needs a package: pip install 'alexnet_jax[hub]'") from error
    return match[1]


def push(source: str, target: str, *, private: bool = False) -> None:
    """Uploads a bundle, a folder, to hf://USER/REPO, which is created if need be."""
    repository = check_target(target)
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=source,
            allow_patterns=[*bundle.files(source)],
            commit_message='Upload a bundle of alexnet_jax',
        )
    except Exception as error:  # of many kinds: no network, no access, a full disk
        raise UserError(
            f'{target}: cannot be written ({one_line(error)}): check the name and the network, and log in '
            'with `hf auth login`'
        ) from error
