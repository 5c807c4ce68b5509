"""What the documents name exists: files, sections, commands, flags, presets and fields."""

import contextlib
import functools
import io
import re
import runpy
import sys

import pytest

from alexnet_jax.common import configfile
from tests.helpers import ROOT

PAGES = [
    *(ROOT / name for name in ('README.md', 'CONTRIBUTING.md')),
    *sorted((ROOT / 'docs').glob('*.md')),
    *sorted((ROOT / 'experiments').glob('*.md')),
    ROOT / 'notebooks/alexnet.ipynb',
]
TEXTS = [
    *PAGES,
    *(
        ROOT / name
        for name in (
            'Makefile',
            'Dockerfile',
            'requirements-dev.txt',
            'experiments/launch/slurm.sbatch',
        )
    ),
    *(
        file
        for folder in ('alexnet_jax', 'configs', 'experiments', 'tests')
        for file in sorted((ROOT / folder).rglob('*.py'))
        if file.name != 'test_docs.py'
    ),
]
FOLDERS = ('', 'alexnet_jax', 'experiments')  # what a path can be relative to
EXAMPLES = {  # what the recipes of docs/code.md add, and placeholders
    *('nets/plain.py', 'tests/nets/test_plain.py', 'tests/commands/test_layers.py'),
    *('configs/plain.py', 'configs/narrow.py', 'configs/NAME.py', 'alexnet_jax/configs'),
    'config.augment.gray',
}
# original.md §3; `docs/design.md` §4 and §5; [original.md](original.md) §0 to §5
SECTION = re.compile(
    r'\b(?:docs/)?(\w+)\.md[`\])]*(?:\([\w./]+\))?,? (§[\d.]+(?:(?:,| to| and) ?§?[\d.]+)*)'
)
COMMAND = re.compile(
    r'(?:python -m ((?:alexnet_jax|experiments|tests)[\w.]*)|alexnet-jax(?: (?!-)(\w+))?)'
    r'((?: +(?!#)[^ \n`]+)*)'
)


def named(page):
    return str(page.relative_to(ROOT))


def blocks(text):
    """The code blocks of a page, with continued lines joined."""
    return [
        block.replace('\\\n', ' ') for block in re.findall(r'^```.*?\n(.*?)^```', text, re.M | re.S)
    ]


def anchors(text):
    """What GitHub calls the headings of a page."""
    heads = re.findall(r'^#+ (.*)', text, re.M)
    return {re.sub(r'[^\w\- ]', '', head.lower()).replace(' ', '-') for head in heads}


def missing_links(page, text):
    wrong = []
    for link in re.findall(r'\]\(([^)\s]+)\)', text):
        target, _, anchor = link.partition('#')
        if '://' in link:
            continue
        file = (page.parent / target) if target else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            wrong.append(link)
    return wrong


def missing_files(text):
    """Paths in backticks that begin with a folder of the repository or of the package."""
    wrong = []
    for name in re.findall(r'`(\w+/[\w./-]*)`', text):
        first = name.split('/')[0]
        homes = [ROOT / folder for folder in FOLDERS if (ROOT / folder / first).is_dir()]
        if first in ('data', 'runs') or name in EXAMPLES:
            continue
        if homes and not any((home / name).exists() for home in homes):
            wrong.append(name)
    return wrong


def missing_sections(text):
    wrong = []
    for name, sections in SECTION.findall(text):
        page = f'docs/{name}.md'
        file = ROOT / page
        heads = re.findall(r'^#+ §?([\d.]+)', file.read_text(), re.M) if file.exists() else []
        known = {head.rstrip('.') for head in heads}
        for section in re.findall(r'[\d.]+', sections):
            if section.rstrip('.') not in known:
                wrong.append(f'{page} §{section}')
    return wrong


@functools.cache
def flags(module):
    """The flags that `python -m MODULE --help` lists; None without such a module."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, 'argv', ['', '--help'])
        try:
            runpy.run_module(module, run_name='__main__', alter_sys=True)
        except SystemExit as end:
            assert not end.code
        except ImportError:
            return None
    return {*re.findall(r'--\w+', out.getvalue())}


def wrong_arguments(module, arguments):
    known = flags(module)
    if known is None:
        return [f'python -m {module}']
    config = [word[9:].strip('"') for word in arguments if word.startswith('--config=')]
    wrong, fields = [], {}
    if not {name.partition(':')[0] for name in config} & {'mine.py', *EXAMPLES}:
        try:
            fields = configfile.fields(configfile.load(*config or ['paper']))
        except Exception as error:
            wrong.append(str(error))
    for word in arguments:
        flag = re.match(r'--[\w.]+', word)
        if flag and flag[0].startswith('--config.'):
            wrong += [] if not fields or flag[0][2:] in fields else [flag[0]]
        elif flag and flag[0] not in known:
            wrong.append(f'{module} {flag[0]}')
    return wrong


def wrong_commands(text):
    wrong = []
    for module, name, words in COMMAND.findall(text):
        module = module or 'alexnet_jax.' + {'': 'main', 'train': 'main'}.get(name, name)
        if module not in ('alexnet_jax.COMMAND', 'alexnet_jax.NAME'):
            wrong += wrong_arguments(module, words.split())
    makefile = (ROOT / 'Makefile').read_text()
    targets = re.findall(r'(?:^|`)make ([a-z-]+)', text, re.M)
    return wrong + [f'make {name}' for name in targets if f'\n{name}:' not in makefile]


@pytest.mark.parametrize('page', PAGES, ids=named)
def test_links_and_files(page):
    text = page.read_text()
    assert missing_links(page, text) == []
    assert missing_files(text) == []


def test_no_placeholders():
    assert re.findall(r'\bQUICK[A-Z]+\b', (ROOT / 'README.md').read_text()) == []


def test_sections():
    wrong = {named(file): missing_sections(file.read_text()) for file in TEXTS}
    assert {file: sections for file, sections in wrong.items() if sections} == {}


def test_citations_name_a_document_in_the_repository():
    """`original.md` alone, or "design §4", sends the reader nowhere."""
    loose = re.compile(r'(?<!docs/)(?<!\[)(?<!\()\b(?:original|design)\.md\b|(?<![/\w])design,? §')
    found = {named(file): loose.findall(file.read_text()) for file in TEXTS if file.suffix == '.py'}
    assert {file: texts for file, texts in found.items() if texts} == {}


@pytest.mark.filterwarnings('ignore:.* found in sys.modules after import of package')
@pytest.mark.parametrize('page', PAGES, ids=named)
def test_commands(page):
    text = page.read_text()
    inline = re.findall(r'`([^`\n]+)`', text)
    assert [wrong for block in [*blocks(text), *inline] for wrong in wrong_commands(block)] == []
    names = re.findall(r'--config\.[a-z_.]+\w', re.sub(r'`\.\.\.', '', text))
    for name in {*re.findall(r'config\.\w+\.\w+', ' '.join(names))}:
        assert name in every_field() | EXAMPLES, name


@functools.cache
def every_field():
    presets = sorted(file.stem for file in configfile.PRESETS.glob('*.py'))
    return {name for preset in presets for name in configfile.fields(configfile.load(preset))}


@pytest.mark.parametrize(
    ('check', 'text', 'wrong'),
    [
        (missing_files, '`nets/blocks.py`, `configs/paper.py`, `runs/a`, `rundir/`', []),
        (missing_files, '`nets/block.py`, `tests/a/`', ['nets/block.py', 'tests/a/']),
        (missing_sections, '`docs/design.md` §4 and §5', []),
        (missing_sections, '(docs/design.md §4, §77)', ['docs/design.md §77']),
        (missing_sections, '`docs/nowhere.md` §1', ['docs/nowhere.md §1']),
        (missing_sections, '(design.md §2), [o](original.md) §3', []),
        (missing_sections, '[original.md](original.md) §0 to §99', ['docs/original.md §99']),
        pytest.param(
            wrong_commands,
            'python -m alexnet_jax.evaluate runs/a --views=ten  # see',
            [],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            wrong_commands,
            'python -m alexnet_jax.evaluat runs/a',
            ['python -m alexnet_jax.evaluat'],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            wrong_commands,
            'python -m alexnet_jax.main --config=paper:tanh --config.model.with=2 --batch=3',
            ['--config.model.with', 'alexnet_jax.main --batch'],
            marks=pytest.mark.slow,
        ),
        (wrong_commands, 'make test\nmake tset', ['make tset']),
        pytest.param(
            wrong_commands,
            'alexnet-jax --config=quickstart\nalexnet-jax evaluate runs/a --bogus',
            ['alexnet_jax.evaluate --bogus'],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_checks_detect_mistakes(check, text, wrong):
    assert check(text) == wrong


def test_the_link_check_detects_mistakes():
    page = ROOT / 'README.md'
    assert missing_links(page, '[a](docs/runs.md#resuming) [b](https://x.y)') == []
    assert missing_links(page, '[a](docs/runs.md#rest) [b](no.md)') == [
        'docs/runs.md#rest',
        'no.md',
    ]
