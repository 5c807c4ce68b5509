"""The benchmark's JAX worker: prepares one task, with the library's own steps, and repeats it.

`__main__` starts one process per task; see `protocol` for how they communicate.
"""

import math
import os
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.input.batches import fake_batches, train_batches
from alexnet_jax.input.store import open_store
from alexnet_jax.nets import network
from alexnet_jax.nets.alexnet import AlexNet
from alexnet_jax.nets.build import build
from alexnet_jax.nets.mobilenet import MobileNet
from alexnet_jax.nets.shufflenet import ShuffleNet
from alexnet_jax.nets.squeezenet import SqueezeNet
from alexnet_jax.training import optim, steps
from alexnet_jax.training.setup import make_optimizer
from alexnet_jax.weights import to_torch
from experiments.benchmark import operations, plain, protocol

MEAN = 120.0  # of every pixel, without a store


def prepare(spec: dict):
    """Prepares the task spec['task'] for `protocol.serve`."""
    if spec['task'] == 'input':
        return _input(spec)
    if spec['form'] != 'plain':  # the baseline runs with JAX's defaults
        meshes.configure(
            spec['devices'] if spec['devices'] > 1 and spec['cpu'] else 0,
            deterministic=spec['deterministic'],
        )
    if spec['task'] in ('matmul', 'copy'):
        return {'matmul': _matmul, 'copy': _copy}[spec['task']](spec)
    config = configfile.load(spec['config'])
    config.model.dtype = spec['dtype']
    net = build(classes=spec['classes'], **config.model)
    tasks = {'train': _train, 'infer': _infer, 'both': _both, 'reference': _reference}
    return tasks[spec['task']](spec, config, net)


def _mesh(spec, net):
    shape = (1, net.towers if spec['devices'] > 1 else 1)
    return meshes.make(shape, towers=net.towers, batches={'--batch': spec['batch']})


def _batch(spec, config):
    rows, crop = np.arange(spec['batch']), config.augment.crop
    return next(
        fake_batches(batch=len(rows), rows=rows, crop=crop, classes=spec['classes'], seed=0)
    )


def _mean(config):
    return np.full((config.augment.crop, config.augment.crop, 3), MEAN, np.float32)


def _training(spec, config, net, mesh):
    """Returns (compiled step, state, batch, rates, facts)."""
    crop = config.augment.crop
    optimizer = make_optimizer(config, net, mesh)
    state = steps.init_state(net, optimizer, mesh, seed=0, crop=crop)
    if spec['form'] == 'plain':
        step = plain.make_train_step(net, optimizer, _mean(config))
    else:
        step = steps.make_train_step(
            net,
            optimizer,
            mesh,
            seed=0,
            mean=_mean(config),
            eigenvectors=np.eye(3),
            sigma=np.array([120.0, 37.0, 20.0]),
            **config.colour,
            several=spec['dispatch'] > 1,
        )
    rates = optim.make_rates(examples=1000, batch=config.train.batch, **config.optim)(0, {})
    rates = optim.scalars(rates)
    batch = meshes.global_batches(mesh, spec['batch'], [_batch(spec, config)] * spec['dispatch'])
    if spec['dispatch'] > 1:
        rates = {name: np.repeat(value, spec['dispatch']) for name, value in rates.items()}
    compiled, facts = _compile(step, state, batch, rates, devices=mesh.size)
    facts['flops'] = operations.totals(net, spec['batch'], crop)['train']
    if spec['dispatch'] > 1:
        del facts['bytes']  # the compiler counts a loop once
    return compiled, state, batch, rates, facts


def _train(spec, config, net):
    """Prepares the training step, on a batch that stays on the device."""
    compiled, state, batch, rates, facts = _training(spec, config, net, _mesh(spec, net))

    def repeat(count):
        nonlocal state
        for _ in range(math.ceil(count / spec['dispatch'])):
            state, sums = compiled(state, batch, rates)
        jax.block_until_ready((state, sums))

    def layers():
        return {'rows': operations.table(net, spec['batch'], config.augment.crop)}

    def same():
        return {'repeats': repeats(lambda state: compiled(state, batch, rates), state)}

    return repeat, facts, {'layers': layers, 'peak': _peak, 'repeats': same}


def repeats(step, state) -> bool:
    """Returns whether three steps from one state give the same bits twice; step(state) -> (state, sums)."""
    ends = []
    for _ in range(2):
        now = jax.tree.map(jnp.copy, state)  # a step may donate its input
        for _ in range(3):
            now, sums = step(now)
        ends.append([np.asarray(x).tobytes() for x in jax.tree.leaves((now, sums))])
    return ends[0] == ends[1]


def _both(spec, config, net):
    """Prepares the training step fed by the real input pipeline, as in the training loop."""
    mesh = _mesh(spec, net)
    compiled, state, _, rates, facts = _training(spec, config, net, mesh)
    pipeline = Pipeline(spec, config)

    def repeat(count):
        nonlocal state
        waiting, before = 0.0, None

        def fetch():
            nonlocal waiting
            began = time.perf_counter()
            batch = [next(pipeline) for _ in range(spec['dispatch'])]
            for one in batch:
                one['label'] = one['label'] % spec['classes']
            batch = meshes.global_batches(mesh, spec['batch'], batch)
            waiting += time.perf_counter() - began
            return batch

        batch = fetch()
        for left in reversed(range(math.ceil(count / spec['dispatch']))):
            state, sums = compiled(state, batch, rates)
            batch = fetch() if left else None
            jax.block_until_ready(before)  # at most two steps in flight
            before = sums
        jax.block_until_ready((state, sums))
        pipeline.rest()
        return {'waiting_s': waiting}

    return repeat, facts, {'peak': _peak, 'drain': pipeline.drain}


class Pipeline:
    """Augmented batches from a store, optionally with a cold page cache at the start of a turn."""

    def __init__(self, spec, config):
        self._spec, self._config, self._batches = spec, config, None

    def __next__(self):
        self._batches = self._batches or self._open()
        return next(self._batches)

    def _open(self):
        size, augment = self._spec['batch'], self._config.augment
        return train_batches(
            open_store(self._spec['store']),
            seed=0,
            batch=size,
            start=0,
            stop=2**40,
            rows=np.arange(size),
            crop=augment.crop,
            chunk=augment.chunk,
            random=augment.random,
            threads=0,
        )

    def drain(self):
        """Before a turn: consumes batches that are ready, or empties the page cache."""
        if self._spec['cold']:
            self.rest()
            evict(self._spec['store'])
        else:
            for _ in range(protocol.drained(self._spec['threads'])):
                next(self)
        return {}

    def rest(self):
        """After a turn: unmaps the store; a file mapped by any worker would stay in the page cache."""
        if self._spec['cold'] and self._batches:
            self._batches.close()
            self._batches = None
            for thread in threading.enumerate():
                if thread.name.startswith('batches'):  # it may still be reading
                    thread.join()


def evict(store: str) -> None:
    """Evicts the files of a store from the page cache (Linux); pages mapped elsewhere stay."""
    for file in os.scandir(store):
        if file.is_file():
            with open(file, 'rb') as opened:
                os.fsync(opened.fileno())  # dirty pages would stay as well
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _input(spec):
    """Prepares reading augmented u8 batches from a store into host memory."""
    pipeline = Pipeline(spec, configfile.load(spec['config']))

    def repeat(count):
        for _ in range(count):
            next(pipeline)
        pipeline.rest()

    return repeat, {}, {'peak': protocol.peak_memory, 'drain': pipeline.drain}


def _infer(spec, config, net):
    """Prepares prediction: center-crop probabilities of images that stay on the device."""
    mesh, crop = _mesh(spec, net), config.augment.crop
    target = steps.abstract_variables(net, mesh, crop)
    shardings = jax.tree.map(lambda x: x.sharding, target)
    variables = jax.device_put(network.init(net, jax.random.key(0), crop), shardings)
    images = meshes.global_batch(mesh, spec['batch'], {'image': _batch(spec, config)['image']})[
        'image'
    ]
    if spec['form'] == 'plain':
        predict = plain.make_predict(net, _mean(config))
    else:
        predict = steps.make_predict(net, mesh, mean=_mean(config), views='center', crop=crop)
    compiled, facts = _compile(predict, variables, images, devices=mesh.size)
    facts['flops'] = operations.totals(net, spec['batch'], crop)['infer']

    def repeat(count):
        for _ in range(count):
            out = compiled(variables, images)
        out.block_until_ready()

    return repeat, facts, {'peak': _peak}


def _reference(spec, config, net):
    """Writes spec['file'] (npz) for a peer: parameters, images, and float32 logits and gradients.

    There are no dropout masks: units are halved as at test time. The gradients are of the mean cross-entropy.
    Facts: `net`, its description; `own`, the distance of our gradients, in the timed precision, from these.
    """
    if not isinstance(net, AlexNet):
        return _torchvision(spec, config, net)
    params = network.init(net, jax.random.key(0), config.augment.crop)['params']
    batch = _batch(spec, config)
    x = batch['image'].astype(np.float32) - np.float32(MEAN)

    def gradients_of(net):
        def loss(params, x, labels):
            out = net.apply({'params': params}, x)[0]
            return optax.softmax_cross_entropy_with_integer_labels(out, labels).mean(), out

        return jax.jit(jax.grad(loss, has_aux=True))(params, x, batch['label'])

    with jax.default_matmul_precision('highest'):  # a GPU would use TF32 for float32
        gradients, logits = gradients_of(net.clone(dtype='float32'))
    own, own_logits = gradients, logits
    if net.dtype != 'float32' or not spec['cpu']:
        own, own_logits = gradients_of(net)
    if spec['plain']:
        same = plain.logits(net, params, x)
        if protocol.distance(same, own_logits) > spec['tolerance']:
            raise ValueError('the plain form computes a different function')
    flat = {
        f'{kind}/{layer}/{name}': np.asarray(value)
        for kind, tree in (('params', params), ('gradients', gradients))
        for layer, leaves in tree.items()
        for name, value in leaves.items()
    }
    np.savez(spec['file'], images=batch['image'], labels=batch['label'], logits=logits, **flat)
    names = (
        'groups',
        'exchange',
        'remove',
        'activation',
        'norm',
        'norm_window',
        'pooling',
        'dropout',
        'dropout_at',
        'conv1_padding',
    )
    facts = {name: getattr(net, name) for name in names}
    facts['after'] = [' '.join(net.ops(i)) for i in range(len(net.kernels))]
    facts = {**facts, 'towers': net.towers, 'mean': MEAN}
    worst = max(map(protocol.distance, jax.tree.leaves(own), jax.tree.leaves(gradients)))
    return lambda count: None, {'net': facts, 'own': worst}, {}


def _torchvision(spec, config, net):
    """The same for a torchvision network, with its names; in training mode, but without dropout."""
    dropout = {'dropout': 0.0} if hasattr(net, 'dropout') else {}
    net = net.clone(
        dtype='float32', input_std=1.0, **dropout
    )  # torchvision's does not divide pixels
    variables = network.init(net, jax.random.key(0), config.augment.crop)
    batch = _batch(spec, config)
    x = batch['image'].astype(np.float32) - np.float32(MEAN)
    train = network.Training(jax.random.key(0), np.arange(spec['batch']))

    def loss(params):
        out = network.apply(net, {**variables, 'params': params}, x, train)[0]
        return optax.softmax_cross_entropy_with_integer_labels(out, batch['label']).mean(), out

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(variables['params'])
    flat = {}
    for kind, tree in (('params', variables), ('gradients', {**variables, 'params': gradients})):
        named = {
            network.names_of(path): np.asarray(v) for path, v in jax.tree.leaves_with_path(tree)
        }
        state = to_torch.state_dict(net, named, config.augment.crop)
        flat |= {f'{kind}/{name}': value for name, value in state.items()}
    np.savez(spec['file'], images=batch['image'], labels=batch['label'], logits=logits, **flat)
    return lambda count: None, {'net': {'torchvision': _class(net), 'mean': MEAN}, 'own': 0.0}, {}


def _class(net) -> str:
    """Returns the name of torchvision's constructor of a network; UserError if it has none."""
    width = getattr(net, 'width', 1.0)
    if isinstance(net, MobileNet) and net.version == 2 and width == 1:
        return 'mobilenet_v2'
    if isinstance(net, SqueezeNet) and width == 1:
        return f'squeezenet{net.version.replace(".", "_")}'
    if isinstance(net, ShuffleNet):
        return f'shufflenet_v2_{net.size.replace(".", "_")}'
    raise UserError(f'--peer: torchvision has no such {type(net).__name__}')


def _compile(function, *args, devices: int):
    """Returns the compiled program, and facts from its compiler."""
    began = time.monotonic()
    compiled = function.lower(*args).compile()
    seconds = time.monotonic() - began
    moved = (compiled.cost_analysis() or {}).get('bytes accessed', 0.0)
    if jax.default_backend() == 'gpu':  # the compiler counts -1 bytes for each library call
        moved += operations.library_bytes(compiled.as_text())
    return compiled, {
        'compile_s': seconds,
        'bytes': moved * devices,  # the program is for one device
        'device': jax.devices()[0].device_kind,
    }


def _matmul(spec):
    """Prepares the arithmetic ceiling: products of large matrices in the compute dtype."""
    size = 3072 if spec['cpu'] else 8192
    x, y = jax.random.normal(jax.random.key(0), (2, size, size), jnp.dtype(spec['dtype']))
    product = jax.jit(lambda x, y: x @ y)

    def repeat(count):
        for _ in range(count):
            out = product(x, y)
        out.block_until_ready()

    return repeat, {'flops': 2 * size**3}, {}


def _copy(spec):
    """Prepares the memory ceiling: reading and writing an array too large for caches."""
    x = jnp.zeros(2**26 if spec['cpu'] else 2**28, jnp.float32)
    bytes_ = 2 * x.nbytes
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def repeat(count):
        nonlocal x
        for _ in range(count):
            x = add(x)
        x.block_until_ready()

    return repeat, {'bytes': bytes_}, {}


def _peak():
    """Returns the peak memory of the device if it reports one, else of the process, in bytes."""
    stats = jax.devices()[0].memory_stats()
    return {'peak_bytes': stats['peak_bytes_in_use']} if stats else protocol.peak_memory()


if __name__ == '__main__':
    protocol.serve(prepare)
