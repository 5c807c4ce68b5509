"""Names of ImageNet's classes."""

import pathlib

from alexnet_jax.common import class_names


def test_the_1000_classes_have_names_of_their_own():
    file = pathlib.Path(class_names.__file__).with_name('imagenet_words.txt')
    numbers = [line.split('\t')[0] for line in file.read_text().splitlines()]
    assert (len(numbers), numbers) == (1000, sorted(numbers))  # in label order
    assert len({*class_names.shown(numbers)}) == 1000


def test_only_numbers_of_wordnet_are_replaced():
    assert class_names.shown(['n01440764', 'roses', 'n00000000']) == ['tench', 'roses', 'n00000000']
    assert class_names.shown(['n02012849', 'n03126707']) == ['crane n02012849', 'crane n03126707']
