"""Networks by name: registered ones, files on the web, and repositories of the Hugging Face Hub.

Downloads are kept in a cache: the published file as NAME-XXXXXXXX.EXT, with the first digits of its
SHA-256, and the bundle made from it as NAME-XXXXXXXX. Environment variables:

    ALEXNET_JAX_CACHE     the cache; default: alexnet_jax in $XDG_CACHE_HOME or ~/.cache
    ALEXNET_JAX_MIRROR    a server that has https://HOST/PATH as MIRROR/HOST/PATH
    HF_ENDPOINT, HF_TOKEN the Hugging Face Hub and an access token (else in $HF_TOKEN_PATH or $HF_HOME/token)
    HF_HUB_OFFLINE=1      only the cache
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
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

from tqdm import tqdm

from alexnet_jax.common import paths
from alexnet_jax.common.errors import UserError, install, one_line, reason, say
from alexnet_jax.weights import bundle, keras, readers, variables
from alexnet_jax.weights.registry import ENTRIES, Entry
from alexnet_jax.weights.variables import Options

OWN = paths.Path(__file__).parent / 'bundles'  # networks that come with this program
PREFIX = 'hub:'
TRIES, PAUSE = 5, 1.0  # attempts without progress, and seconds between them
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 20  # bytes
SMALL = 1 << 20  # bytes: the limit for files other than weights without a checksum
SHOWN = 8  # hex digits of a SHA-256 in the name of a file


def locate(name: str | os.PathLike) -> str:
    """Returns the folder of a network: a run directory or a bundle, which is downloaded if need be.

    name: a folder; a name that `names` lists, perhaps after 'hub:'; https://...#sha256=... (a weight file);
    or hf://USER/REPO[@REVISION] (a bundle). A folder with a config.json takes precedence over a registered
    name. Raises UserError for names that do not exist, and for failed downloads.
    """
    text = os.fspath(name)
    known = text.removeprefix(PREFIX)
    if is_folder(name) and (os.path.exists(text) or '://' in text or not _close(text, 0.6)):
        return text
    if text.startswith('hf://'):
        return _from_hugging_face(text)
    if re.match(r'https?://', text):
        return _from_url(text)
    if known in ENTRIES:
        return _registered(known, ENTRIES[known])
    if known in names():
        return str(OWN / known)
    close = ', '.join(_close(known, 0.4))
    what = (
        'no network of this name'
        if known != text
        else 'neither a run directory nor a registered network'
    )
    raise UserError(
        f'{text}: {what}{f" (did you mean {close}?)" if close else ""}; python -m alexnet_jax.hub '
        'list shows all names'
    )


def is_folder(name: str | os.PathLike) -> bool:
    """Whether a name means a folder, existing or not, so that there is nothing to download."""
    text = os.fspath(name)
    if re.match(f'(hf|https?)://|{PREFIX}', text):
        return False
    return text not in names() or (paths.path(text) / bundle.CONFIG).is_file()


def _close(name: str, cutoff: float) -> list[str]:
    """Registered names like this one."""
    return difflib.get_close_matches(name, names(), n=3, cutoff=cutoff)


def checked(name: str | os.PathLike) -> str:
    """Like `locate`, but for a bundle, and checks its files; rebuilds a damaged one in the cache."""
    folder = locate(name)
    if not bundle.is_bundle(folder):
        raise UserError(f'{name}: not a bundle; python -m alexnet_jax.hub list shows all names')
    try:
        bundle.read(folder)
    except UserError:
        if os.path.realpath(os.path.dirname(folder)) != os.path.realpath(cache()):
            raise
        with _locked(folder):
            shutil.rmtree(folder)
        folder = locate(name)
    return folder


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


def here(name: str, entry: Entry) -> str | None:
    """The bundle of a registered network or, before its first use, its file in the cache; None if absent."""
    return cached(name, entry.checksum) or cached(name, entry.checksum, _ext(entry))


def _ext(entry: Entry) -> str:
    return os.path.splitext(urllib.parse.urlsplit(entry.url).path)[1]


def _plain(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r'[^\w.@-]+', '-', name)


def _registered(name: str, entry: Entry) -> str:
    found = cached(name, entry.checksum)
    if found and _is_current(found):
        return found
    ext = _ext(entry)
    if ext == '.h5':
        keras.check_installed()
    file = download(name, entry.url, ext, entry.checksum, entry.size)
    return _converted(file, entry.checksum, facts(entry), entry.preset)


def facts(entry: Entry) -> dict:
    """What the card of a registered network says."""
    return {
        'title': entry.title,
        'source': entry.page,
        'url': entry.url,
        'license': entry.license,
        'data': 'ImageNet (ILSVRC-2012)',
        'published': entry.published,
        'measured': entry.measured,
    }


def _from_url(text: str) -> str:
    url, _, fragment = text.partition('#')
    match = re.fullmatch(r'sha256=([0-9a-fA-F]{64})', fragment)
    if not match:
        raise UserError(
            f'{text}: to check the file, append #sha256= and the 64 digits of its SHA-256'
        )
    path = urllib.parse.urlsplit(_quoted(url, url)).path
    stem, ext = os.path.splitext(os.path.basename(path))
    name, checksum = f'url-{stem[:100]}', ('sha256', match[1].lower())
    found = cached(name, checksum)
    if found and _is_current(found, checksum[1]):
        return found
    file = download(name, url, ext if re.fullmatch(r'\.\w+', ext) else '.bin', checksum)
    return _converted(file, checksum, {'url': url})


def _converted(file: str, checksum, facts: dict, preset: str = '') -> str:
    """Converts a download to a bundle -> its folder; removes a useless file that has no checksum."""
    folder = os.path.splitext(file)[0]
    digest = _digest(file, 'sha256')
    with _locked(folder):
        if not _is_current(folder, digest):
            try:
                found = readers.read(file, Options(preset))
            except UserError:
                if checksum is None:
                    os.unlink(file)
                raise
            if os.path.exists(folder):
                shutil.rmtree(folder)
            card = {**found.card, **facts, 'sha256': digest}
            bundle.write(folder, found._replace(card=card))
    return folder


def _is_current(folder: str, sha256: str = '') -> bool:
    """Whether a folder is a bundle that this version of the program made from the file with this hash."""
    try:
        card = bundle.read_config(folder)[1]
    except UserError:
        return False
    same = (card.get('sha256') or '').startswith(sha256)
    return bundle.is_bundle(folder) and same and card.get('converter') == readers.VERSION


def _from_hugging_face(text: str) -> str:
    match = re.fullmatch(r'hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?', text)
    if not match:
        raise UserError(f'{text}: expected hf://USER/REPO or hf://USER/REPO@REVISION')
    repository, revision = match[1], match[2] or 'main'
    endpoint = _server('HF_ENDPOINT') or 'https://huggingface.co'
    address = f'{endpoint}/{repository}/resolve/{urllib.parse.quote(revision, safe="")}'
    name = f'hf-{repository.replace("/", "--")}@{revision}'
    token = _token()
    headers = {'Authorization': f'Bearer {token}'} if token else {}
    offline = os.environ.get('HF_HUB_OFFLINE', '').lower() in ('1', 'true', 'yes', 'on')
    found = cached(name)
    if found and (offline or re.fullmatch('[0-9a-f]{40}', revision)):  # a commit stays the same
        return found
    with tempfile.TemporaryDirectory() as temporary:
        file = os.path.join(temporary, bundle.CONFIG)
        try:
            if offline:
                raise Unreachable(f'{text}: HF_HUB_OFFLINE is set')
            tries = 1 if found else TRIES
            _fetch(
                f'{address}/{bundle.CONFIG}', file, text, headers=headers, tries=tries, most=SMALL
            )
        except Unreachable as error:
            if not found:
                raise _not_here(error) from None
            say(f'{error}: using {found}')
            return found
        try:
            sums = bundle.checksums(temporary)
        except UserError:
            raise UserError(f'{text}: this repository contains no alexnet_jax bundle') from None
        folder = os.path.join(cache(), f'{_plain(name)}-{_digest(file, "sha256")[:SHOWN]}')
        if bundle.is_bundle(folder):
            return folder
        with _locked(folder):
            if not bundle.is_bundle(folder):
                _download_bundle(address, folder, file, sums, text, headers)
    return folder


def _token() -> str:
    """The access token for the Hugging Face Hub, found as huggingface_hub does; '' if there is none."""
    source, token = 'HF_TOKEN', os.environ.get('HF_TOKEN', '').strip()
    if not token:
        cache = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
        home = os.environ.get('HF_HOME') or os.path.join(cache, 'huggingface')
        file = os.environ.get('HF_TOKEN_PATH') or os.path.join(home, 'token')
        source = os.path.expanduser(file)
        with contextlib.suppress(OSError), open(source, encoding='latin-1') as opened:
            token = opened.read().strip()
    if token and not re.fullmatch('[!-~]+', token):
        raise UserError(f'{source}: has characters that are not allowed in a token; copy it again')
    return token


def _download_bundle(address, folder, config, sums, called, headers) -> None:
    """Downloads the files of a bundle, whose config is there already."""
    parts = f'{folder}.part'  # kept if the download stops, so that it can resume
    os.makedirs(parts, exist_ok=True)
    for name in bundle.files(os.path.dirname(config))[1:]:
        target, checksum = os.path.join(parts, name), sums.get(name)
        if not (checksum and os.path.exists(target) and _digest(target, 'sha256') == checksum):
            with _here():
                _fetch(
                    f'{address}/{name}',
                    f'{target}.part',
                    f'{called}: {name}',
                    ('sha256', checksum) if checksum else None,
                    headers=headers,
                    most=variables.LARGEST if checksum else SMALL,
                )
            os.replace(f'{target}.part', target)
    shutil.copy(config, os.path.join(parts, bundle.CONFIG))
    if os.path.exists(folder):
        shutil.rmtree(folder)  # a part of a bundle
    os.rename(parts, folder)


class Unreachable(UserError):
    """No answer from a server."""


def _not_here(error: Unreachable) -> UserError:
    """The error for a download without a network: says what is in the cache."""
    known = [name for name in names() if name not in ENTRIES or here(name, ENTRIES[name])]
    folders = [path for path in glob.glob(os.path.join(cache(), '*')) if bundle.is_bundle(path)]
    others = [os.path.basename(path) for path in folders]
    there = [*known, *(name for name in others if name.startswith(('hf-', 'url-')))]
    return UserError(
        f'{error}; available offline: {", ".join(there) or "nothing"} (cache: {cache()})'
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

    checksum: (algorithm, at least its first hex digits); size: in bytes, roughly. An interrupted download
    is resumed if there is a checksum to verify the result. Raises UserError if the file cannot be reached,
    is truncated or is a different one.
    """
    digits = f'-{checksum[1][:SHOWN]}' if checksum else ''
    part = os.path.join(cache(), f'{_plain(name)}{digits}{ext}.part')
    with _locked(part):
        found = cached(name, checksum, ext)
        if found:
            kind, known = checksum or ('sha256', found.removesuffix(ext)[-SHOWN:])
            if _digest(found, kind).startswith(known):
                return found
        with _here():
            _fetch(_mirrored(url), part, name, checksum, size)
        target = os.path.join(cache(), f'{_plain(name)}-{_digest(part, "sha256")[:SHOWN]}{ext}')
        os.replace(part, target)
    return target


def _mirrored(url: str) -> str:
    mirror = _server('ALEXNET_JAX_MIRROR')
    return f'{mirror}/{url.partition("://")[2]}' if mirror else url


def _server(variable: str) -> str:
    """The address in an environment variable, '' if there is none."""
    found = os.environ.get(variable, '').strip().rstrip('/')
    if found and not re.match('https?://', found):
        raise UserError(f'{variable}={found}: must start with https:// or http://')
    return found


def _quoted(url: str, called: str) -> str:
    """Escapes the characters of a URL that need it; UserError if it is not one."""
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.hostname and parts.port != 0:  # reading a damaged port raises ValueError
            return urllib.parse.quote(url, safe="%/:?#[]@!$&'()*+,;=~")
        why = 'no host'
    except ValueError as error:
        why = one_line(error)
    raise UserError(f'{called}: not a valid web address ({why}); check the URL')


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
    tries: int = TRIES,
    most: int = variables.LARGEST,
) -> None:
    """Downloads a file of at most `most` bytes to `part`, resuming where it ends if there is a checksum.

    If the connection breaks, what was read stays there; a complete but wrong file is removed.
    """
    url = _quoted(url, called)
    left, total, before = tries, None, _size(part)
    while True:
        start = _size(part)
        try:
            total = _rest(url, part, called, start if checksum else 0, headers or {}, most)
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
        except Broken as error:
            why = str(error)
        here = _size(part)
        left = tries if here > start and checksum else left - 1
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


class Broken(Exception):
    """A connection that failed."""


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Turns any error in reading from the web, except an HTTP status, into Broken."""
    try:
        yield
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Broken(_text(getattr(error, 'reason', '')) or one_line(error)) from None


def _rest(url: str, part: str, called: str, start: int, headers: dict, most: int) -> int | None:
    """Appends the bytes from `start` on to a file -> the size of all, None if the server does not say."""
    request = urllib.request.Request(url, headers={'User-Agent': 'alexnet_jax', **headers})
    if start:
        request.add_header('Range', f'bytes={start}-')
    opener = urllib.request.build_opener(_Redirects)
    with _reading():
        response = opener.open(request, timeout=TIMEOUT)
    with response:
        place = re.match(r'bytes (\d+)-\d+/(\d+|\*)', response.headers.get('Content-Range', ''))
        resumed = response.status == 206 and place and int(place[1]) == start
        if response.status == 206 and not resumed:
            raise Broken('a different part than requested')
        start = start if resumed else 0
        length = response.headers.get('Content-Length')
        total = start + int(length) if length and length.isdigit() else None
        # Shown in terminals (None) and in notebooks.
        hidden = False if 'ipykernel' in sys.modules else None
        with (
            open(part, 'ab' if resumed else 'wb') as file,
            tqdm(
                desc=called,
                initial=start,
                total=total,
                unit='B',
                unit_scale=True,
                disable=hidden,
            ) as bar,
        ):
            while True:
                with _reading():
                    data = response.read(CHUNK)
                if max(file.tell() + len(data), total or 0) > most:
                    raise UserError(f'{called}: {url} has more than {most:,} bytes')
                if not data:
                    break
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
        problem = f'its {kind} is {found}, but should be {checksum[1]}'
    os.unlink(part)
    short = f'truncated: {here:,} of {size:,} bytes; ' if size and here < 0.999 * size else ''
    raise UserError(
        f'{called}: {url}: {short}{problem}: removed; try again; if this persists, the file has been '
        'replaced, or a proxy is altering it'
    )


def check_target(target: str) -> str:
    """hf://USER/REPO -> USER/REPO. Raises UserError for any other form, or without huggingface_hub."""
    match = re.fullmatch(r'hf://([\w.-]+/[\w.-]+)', target)
    if not match:
        raise UserError(f'{target}: expected hf://USER/REPO')
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise UserError(f'{target}: needs the package huggingface_hub: {install("hub")}') from error
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
            commit_message='Upload an alexnet_jax bundle',
        )
    except Exception as error:  # of many kinds: no network, no access, a full disk
        raise UserError(
            f'{target}: cannot be written ({one_line(error)}): check the name and the network, and log in '
            'with `hf auth login`'
        ) from error
