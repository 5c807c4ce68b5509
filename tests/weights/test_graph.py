"""Networks as graphs of ONNX operators. tests/deploy/test_export.py runs them in onnxruntime."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError
from alexnet_jax.devices import backend
from alexnet_jax.nets import layers, network
from alexnet_jax.nets.build import build
from alexnet_jax.weights import graph
from tests.helpers import graphs


def read(function, crop=8, maps=True):
    with backend.portable(sums=True):
        return graph.read(function, crop, np.float32, maps=maps)


def ops(found):
    return [node.op for node in found.nodes]


def of_preset(preset, crop, **changes):
    net = build(classes=4, **{**configfile.load(preset).model, **changes})
    rng = np.random.default_rng(0)
    arrays = jax.tree.map(lambda x: rng.uniform(size=x.shape), network.shapes(net, crop))
    return read(lambda images: network.apply(net, arrays, images)[0], crop)


PAPER = (
    'Conv Relu Split LRN LRN Concat MaxPool Conv Relu Split LRN LRN Concat MaxPool '
    'Conv Relu Conv Relu Conv Relu MaxPool Transpose Reshape Gemm Relu Gemm Relu Gemm'
)


def test_the_papers_network_is_what_one_would_write_by_hand():
    found = of_preset('paper', 64, width=0.125)
    assert ops(found) == PAPER.split()
    convs = [node for node in found.nodes if node.op == 'Conv']
    assert [node.attributes['group'] for node in convs] == [1, 2, 1, 2, 2]
    assert [node.name for node in convs] == [f'conv{i}' for i in range(1, 6)]
    (norm, *_) = (node for node in found.nodes if node.op == 'LRN')
    # The paper's alpha multiplies each square, ONNX's their mean.
    assert norm.attributes == {'alpha': 5e-4, 'beta': 0.75, 'bias': 2.0, 'size': 5}


def test_batch_normalization_disappears():
    found = of_preset('alexnet_bn', 64, width=0.125)
    assert not {'Add', 'Mul', 'Split', 'Concat'} & {*ops(found)}


def test_relu6_is_one_operator():
    found = of_preset('mobilenet', 32, width=0.35)
    assert 'Min' not in ops(found) and ops(found).count('Clip') == 35


def test_factors_move_into_the_layer():
    kernel, bias = np.ones((1, 1, 3, 2), np.float32), np.array([1, 2], np.float32)

    def function(x):
        return layers.conv(x / 4, kernel, bias) * 0.5 + 3

    (transpose,), (conv,) = (
        [n for n in read(function).nodes if n.op == op] for op in ('Transpose', 'Conv')
    )
    assert transpose.inputs == [conv.output]
    np.testing.assert_allclose(conv.inputs[1], np.full((2, 3, 1, 1), 0.125))
    np.testing.assert_allclose(conv.inputs[2], [3.5, 4])


def test_a_value_used_twice_is_not_folded():
    kernel = np.ones((1, 1, 3, 3), np.float32)

    def function(x):
        y = layers.conv(x, kernel)
        return (y * 2 + jnp.tanh(y)).sum((1, 2))

    assert ops(read(function)).count('Mul') == 2  # and one of the sum


def test_towers_that_differ_stay_apart():
    def function(x):
        a, b = jnp.split(layers.conv(x, np.ones((1, 1, 3, 4), np.float32)), 2, axis=3)
        return jnp.concatenate([jnp.tanh(a), jnp.exp(b)], axis=3).sum((1, 2))

    assert {'Split', 'Tanh', 'Exp', 'Concat'} <= {*ops(read(function))}


def towers(function):
    """function(a, b) of the halves of a convolution's maps, [B,8,8,4] each."""
    kernel = np.random.default_rng(1).normal(size=(3, 3, 3, 8)).astype(np.float32)

    def whole(x):
        a, b = jnp.split(layers.conv(x, kernel, padding=((1, 1), (1, 1))), 2, axis=3)
        return function(a, b).mean((1, 2))

    return whole


def joined(*x):
    return jnp.concatenate(x, axis=3)


def softmax(x):
    exponentials = jnp.exp(x - x.max(3, keepdims=True))
    return exponentials / exponentials.sum(3, keepdims=True)


def convolved(*x, like=True):
    """A convolution of each, with a different kernel."""
    rng = np.random.default_rng(2)
    shapes = [(3, 3, tower.shape[-1], 4 if like else 4 + i) for i, tower in enumerate(x)]
    kernels = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    return [
        layers.conv(tower, k, padding=((1, 1), (1, 1))) for tower, k in zip(x, kernels, strict=True)
    ]


@pytest.mark.parametrize(
    'function',
    [
        lambda a, b: joined(b, a),
        lambda a, b: joined(*convolved(b, a)),
        lambda a, b: joined(*convolved(a, b)[::-1]),
        lambda a, b: joined(*convolved(a, b, like=False)),
        lambda a, b: joined(*convolved(a, a)),
        lambda a, b: joined(*convolved(*convolved(a, b)[::-1])),
        lambda a, b: a * b,
        lambda a, b: joined(a * b, b * a),
        lambda a, b: joined(a * 2, b * 3),
        lambda a, b: joined(a * jnp.tanh(a), b * jnp.tanh(b)),
        lambda a, b: joined(a * jnp.tanh(b), b * jnp.tanh(a)),
        lambda a, b: joined(a - jnp.tanh(b), b - jnp.tanh(b)),
        lambda a, b: joined(a - b, b - a),
        lambda a, b: joined(softmax(a), softmax(b)),
        lambda a, b: joined(a + np.arange(4.0).reshape(1, 1, 1, 4), b + np.ones((1, 1, 1, 4))),
        lambda a, b: joined(*(layers.max_pool(t, window=3, stride=2) for t in (b, a))),
        lambda a, b: (
            joined(*(layers.lrn(t, alpha=0.1, k=2.0, n=5, beta=0.75) for t in (a, b)))
            * joined(a, b)
        ),
    ],
)
def test_towers_compute_the_same_as_a_graph(function):
    found = read(towers(function))
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
    expected = towers(function)(x)
    np.testing.assert_allclose(
        graphs.run(found, x.transpose(0, 3, 1, 2)), expected, rtol=1e-4, atol=1e-4
    )


def test_the_papers_network_computes_the_same_as_a_graph():
    net = build(classes=4, **{**configfile.load('paper').model, 'width': 0.125})
    rng = np.random.default_rng(0)
    arrays = jax.tree.map(
        lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), network.shapes(net, 64)
    )
    images = rng.normal(0, 50, (2, 64, 64, 3)).astype(np.float32)

    def function(x):
        return network.apply(net, arrays, x)[0]

    found, expected = graphs.run(read(function, 64), images.transpose(0, 3, 1, 2)), function(images)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_an_operation_without_counterpart_is_named():
    with pytest.raises(UserError, match='uses sort, which cannot be written as ONNX'):
        read(lambda x: jnp.sort(x, axis=3))
    with pytest.raises(UserError, match='multiplies activations'):
        read(lambda x: jnp.einsum('bhwc,bhwd->bcd', x, x))
    with pytest.raises(UserError, match='reshapes the batch'):
        read(lambda x: x.reshape(-1))


@pytest.mark.parametrize('norm', (layers.lrn, layers.map_norm))
def test_the_other_form_of_the_layers_computes_the_same(norm):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 9, 8)), jnp.float32)

    def functions():
        yield norm(x, alpha=0.1, k=2.0, n=5, beta=0.75)
        for window, stride in ((3, 2), (2, 2), (3, 3)):
            yield layers.max_pool(x, window=window, stride=stride)
            yield layers.avg_pool(x, window=window, stride=stride)

    usual = [*functions()]
    for sums in (False, True):
        with backend.portable(sums=sums):
            for a, b in zip(usual, functions(), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6)


def test_folded_computes_the_same_with_nothing_left_to_compute_from_parameters():
    net = build(classes=4, **{**configfile.load('alexnet_bn').model, 'width': 0.125})
    rng = np.random.default_rng(0)
    arrays = jax.tree.map(
        lambda x: rng.uniform(size=x.shape).astype(np.float32), network.shapes(net, 64)
    )
    image = jax.ShapeDtypeStruct((2, 64, 64, 3), np.float32)

    def function(images):
        return network.apply(net, arrays, images)[0]

    found = graph.folded(function, image)
    x = rng.normal(size=image.shape).astype(np.float32)
    np.testing.assert_allclose(found(x), function(x), rtol=1e-5)
    before, after = (
        [eqn.primitive.name for eqn in jax.make_jaxpr(f)(image).eqns] for f in (function, found)
    )
    assert 'rsqrt' in before and 'rsqrt' not in after
