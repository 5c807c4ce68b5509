"""Readable names for ImageNet's classes, which its datasets list by WordNet ID, such as n01440764.

`imagenet_words.txt` has the first word of each of the 1,000 synsets of ILSVRC-2012 (WordNet 3.0,
copyright 2006 by Princeton University).
"""

import collections
import functools
import unicodedata
from collections.abc import Sequence

from alexnet_jax.common.errors import UserError, printable
from alexnet_jax.common.paths import Path


@functools.cache
def _table() -> dict[str, str]:
    text = Path(__file__).with_name('imagenet_words.txt').read_text(encoding='utf-8')
    words = dict(line.split('\t') for line in text.splitlines())
    count = collections.Counter(words.values())
    return {
        number: word if count[word] == 1 else f'{word} {number}' for number, word in words.items()
    }


def imagenet() -> list[str]:
    """The names of ILSVRC-2012's 1,000 classes by label: WordNet IDs, as in a store of ImageNet."""
    return [*_table()]


def shown(names: Sequence[str]) -> list[str]:
    """Class names for display: WordNet IDs become words; other names are unchanged.

    ILSVRC-2012 has two classes named crane and two named maillot; these keep their IDs as a suffix.
    """
    return [printable(_table().get(name, name)) for name in names]


def as_utf8(name: str) -> str:
    """A file's name as in a UTF-8 locale, whatever the locale is; bytes that are not UTF-8 are kept."""
    return name.encode('utf-8', 'surrogateescape').decode('utf-8', 'surrogateescape')


def checked(names: Sequence[str], source: str) -> list[str]:
    """The names of a source's classes, `as_utf8`; UserError for one that a list of names cannot hold."""
    names = [as_utf8(name) for name in names]
    for name in names:
        if not name.strip():
            wrong = 'is empty'
        elif any(unicodedata.category(c) == 'Cs' for c in name):
            wrong = 'is not valid UTF-8'
        elif any(unicodedata.category(c) in ('Cc', 'Zl', 'Zp') for c in name):
            wrong = 'contains a line break or another control character'
        else:
            continue
        raise UserError(
            f'{source}: the class name "{name}" {wrong}: rename it (its folder or its label in the list)'
        )
    return names
