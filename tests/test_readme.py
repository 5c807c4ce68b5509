"""The programs of README.md and docs/runs.md run as they stand; the README's results are stored ones."""

import re

import numpy as np
import pytest
from PIL import Image

from tests.helpers import ROOT, run_dirs
from tests.helpers.run_dirs import CLASSES, without_tensorflow
from tests.test_paper import NUMBER, paragraphs


@pytest.mark.slow
def test_the_program_in_python(tmp_path, monkeypatch, capsys):
    """On a tiny run in place of the quickstart's, and of the pre-trained network."""
    pages = [(ROOT / name).read_text() for name in ('README.md', 'docs/runs.md')]
    (first, second), (loop,) = (re.findall(r'```python\n(.*?)```', page, re.S) for page in pages)
    assert len(loop.splitlines()) <= 40
    assert len(pages[0].splitlines()) <= 160
    monkeypatch.chdir(tmp_path)
    without_tensorflow(monkeypatch)
    write_store, rng = run_dirs.write_store, np.random.default_rng(0)

    def colored(path, *, classes, counts, size, **options):
        """Classes that a network can learn: noise around a color of their own."""
        colors = rng.integers(0, 256, (classes, 1, 1, 3))
        pictures = {
            split: (
                0.8 * colors[np.arange(n) % classes]
                + 0.2 * rng.integers(0, 256, (n, size, size, 3))
            ).astype(np.uint8)
            for split, n in counts.items()
        }
        return write_store(
            path,
            classes=classes,
            size=size,
            pictures=pictures,
            labels={split: np.arange(n) % classes for split, n in counts.items()},
            **options,
        )

    monkeypatch.setattr(run_dirs, 'write_store', colored)
    made = run_dirs.write_run(tmp_path)
    (tmp_path / 'runs').mkdir()
    made.path.rename(tmp_path / 'runs/quickstart')
    for name in ('picture.jpg', 'other.png'):
        Image.fromarray(made.pictures['train'][0]).resize((90, 70)).save(name)
    assert "'squeezenet'" in first
    exec(compile(first.replace('squeezenet', 'runs/quickstart'), 'README.md', 'exec'), {})
    assert capsys.readouterr().out.startswith('class ')
    names = {}
    exec(compile(second, 'README.md', 'exec'), names)
    assert capsys.readouterr().out.startswith('class ')
    assert names['probabilities'].shape == (CLASSES,) and names['fc7'].shape == (2, 256)
    exec(compile(loop, 'docs/runs.md', 'exec'), names)
    assert names['step'] == 99 and 0 < names['value'] < 0.95 * np.log(CLASSES)


def wrong_results(text):
    """Numbers that are not together in a paragraph of the section linked with them.

    In the table of claims, the link is in the first column and the numbers are in the third, where a
    semicolon ends a part. Elsewhere, the numbers are in the text of the link.
    """
    link = re.compile(r'\[([^]]+)\]\(([\w/]+\.md#[^)]+)\)')
    text = text.replace('−', '-').replace('*', '')
    _, *claims = re.findall(r'^\| ([^|]+) \|[^|]+\| ([^|]+) \|[^|]+\|$', text, re.M)
    said = [(found, *link.search(claim).groups()[1:]) for claim, found in claims]
    said += link.findall(re.sub(r'(?m)^\|.*', '', text))
    return [
        part
        for found, target in said
        for part in found.split('; ')
        if not any({*NUMBER.findall(part)} <= kept for kept in paragraphs(f'../{target}'))
    ]


def test_the_results_are_those_that_were_kept():
    text = (ROOT / 'README.md').read_text()
    assert wrong_results(text) == []
    for right, wrong in (('(+3.43,', '(+3.37,'), ('**6.7×**', '**6.8×**'), ('[1m26s', '[1m27s')):
        assert right in text and len(wrong_results(text.replace(right, wrong))) == 1
