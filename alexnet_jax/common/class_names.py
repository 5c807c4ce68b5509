"""Readable names for ImageNet's classes, which its data sets list by WordNet ID, such as n01440764.

`imagenet_words.txt` has the first word of each of the 1,000 synsets of ILSVRC-2012 (WordNet 3.0,
copyright 2006 by Princeton University).
"""

import collections
import functools
from collections.abc import Sequence

from alexnet_jax.common.paths import Path


@functools.cache
def _table() -> dict[str, str]:
    text = Path(__file__).with_name('imagenet_words.txt').read_text(encoding='utf-8')
    words = dict(line.split('\t') for line in text.splitlines())
    count = collections.Counter(words.values())
    return {
        number: word if count[word] == 1 else f'{word} {number}' for number, word in words.items()
    }


def shown(names: Sequence[str]) -> list[str]:
    """Class names for display: WordNet IDs become words; other names stay.

    ILSVRC-2012 has two classes named crane and two named maillot; these keep their IDs as a suffix.
    """
    return [_table().get(name, name) for name in names]
