"""Lists, describes, downloads and publishes networks by name.

    python -m alexnet_jax.hub list
    python -m alexnet_jax.hub info torchvision/alexnet
    python -m alexnet_jax.hub download squeezenet
    python -m alexnet_jax.hub push runs/mine hf://USER/REPO

Names are those that `list` shows, hf://USER/REPO[@REVISION], and https://...#sha256=... of a weight
file. Every command that takes a run directory also takes them, as does --config.train.init_from, in the
form hub:torchvision/alexnet. Errors are in percent.
"""

import os
import tempfile

from alexnet_jax import command
from alexnet_jax.common.errors import UserError, say
from alexnet_jax.weights import bundle, hub
from alexnet_jax.weights.registry import ENTRIES

ACTIONS = {'list': [], 'info': ['NAME'], 'download': ['NAME'], 'push': ['RUN', 'hf://USER/REPO']}


def main() -> None:
    parser = command.make_parser('hub', __doc__)
    parser.add_argument('action', choices=ACTIONS, metavar='ACTION', help=', '.join(ACTIONS))
    parser.add_argument('names', nargs='*', metavar='NAME', help='the network, as above')
    parser.add_argument('--step', **{**command.STEP, 'help': f'push: {command.STEP["help"]}'})
    parser.add_argument('--title', default='', help='push: title of the model card')
    parser.add_argument(
        '--license', default='', help='push: license of the weights, such as apache-2.0'
    )
    parser.add_argument('--private', action='store_true', help='push: create a private repository')
    args = parser.parse_intermixed_args()
    wanted = ACTIONS[args.action]
    if len(args.names) != len(wanted):
        raise UserError(f'usage: {" ".join([parser.prog, args.action, *wanted])}')
    if args.action == 'list':
        show()
    elif args.action == 'info':
        describe(*args.names)
    elif args.action == 'download':
        say(hub.checked(*args.names))
    else:
        upload(*args.names, args)


def show() -> None:
    """Prints a table of the registered networks."""
    rows = [('name', 'size', 'top-1', 'top-5', 'here', 'network')]
    for name in hub.names():
        facts, size, here = about(name)
        found = facts.get('measured') if name not in ENTRIES else facts.get('published')
        errors = [f'{found[key]:.1f}' if key in found else '' for key in bundle.METRICS]
        rows.append((name, megabytes(size), *errors, 'yes' if here else '', facts['title']))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, 'lrrrll', strict=True)
        line = '  '.join(c.ljust(w) if side == 'l' else c.rjust(w) for c, w, side in cells)
        say(line.rstrip())
    say(
        f'cache: {hub.cache()}; errors: published ones, except for networks that come with this program'
    )


def about(name: str) -> tuple[dict, int | None, str | None]:
    """(facts as on a card, size of the download in bytes, path if cached) of a registered network."""
    if name not in ENTRIES:
        folder = hub.locate(f'{hub.PREFIX}{name}')
        size = sum(os.path.getsize(os.path.join(folder, file)) for file in bundle.files(folder))
        return bundle.read_config(folder)[1], size, folder
    entry = ENTRIES[name]
    return hub.facts(entry), entry.size, hub.here(name, entry)


def megabytes(size: int | None) -> str:
    return '' if size is None else f'{size / 1e6:.1f} MB'


def describe(name: str) -> None:
    """Prints what is known about a network; downloads nothing that is registered."""
    known = name.removeprefix(hub.PREFIX)
    if known in hub.names():
        facts, size, here = about(known)
        facts |= {'size': megabytes(size) or 'unknown', 'here': here or 'no'}
        if known in ENTRIES:
            entry = ENTRIES[known]
            whose = "the publisher's" if entry.theirs else "ours, of the publisher's file"
            checksum = entry.checksum and f'{entry.checksum[0]} {entry.checksum[1]} ({whose})'
            facts |= {'preset': entry.preset, 'checksum': checksum or 'none published'}
    else:
        folder = hub.checked(name)
        facts = {**bundle.read_config(folder)[1], 'here': folder}
    texts = {
        'published': bundle.errors,
        'measured': bundle.errors,
        'compression': bundle.compression,
    }
    for key, value in facts.items():
        text = texts[key](value) if key in texts else value
        if text:
            say(f'{key:11} {text}')


def upload(name: str, target: str, args) -> None:
    """Turns a run into a bundle, or takes a bundle, and uploads it."""
    hub.check_target(target)
    command.start()
    from alexnet_jax.devices import mesh as meshes
    from alexnet_jax.training import inference

    run = inference.open_run(name, meshes.make((1, 1), towers=1, batches={}), args.step)
    card = {'title': args.title, 'license': args.license}
    made = inference.as_bundle(run, **{key: value for key, value in card.items() if value})
    with tempfile.TemporaryDirectory() as folder:
        compress = run.bundle is not None and bundle.COMPRESSED in bundle.files(run.path)
        bundle.write(os.path.join(folder, 'bundle'), made, compress=compress)
        hub.push(os.path.join(folder, 'bundle'), target, private=args.private)
    say(f'{name} is now in {target}')


if __name__ == '__main__':
    command.run(main)
