"""The training step and the prediction step, each a single program over the whole mesh."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alexnet_jax.common.errors import choose
from alexnet_jax.devices import backend
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.input.images import central
from alexnet_jax.nets import network
from alexnet_jax.nets.network import Network
from alexnet_jax.training import metrics

VIEWS = {  # offsets as fractions of the room, and flips; in the 2012 code's order (`docs/original.md` §5)
    'center': [(0.5, 0.5, False)],
    'ten': [
        (y, x, flip)
        for flip in (False, True)
        for y, x in ((0, 0), (0, 1), (0.5, 0.5), (1, 0), (1, 1))
    ],
}


@struct.dataclass
class TrainState:
    """The state that training updates. step: i32[], updates made; the others: trees of f32.

    batch_stats: the running statistics of batch normalization, {} for a network without it. ema: the
    moving average of both, {'params', 'batch_stats'}; None unless `config.train.ema` asks for it.
    """

    step: jax.Array
    params: dict
    batch_stats: dict
    opt_state: optax.OptState
    ema: dict | None = None

    @property
    def variables(self) -> dict:
        """The variables that `network.apply` takes."""
        return {'params': self.params, 'batch_stats': self.batch_stats}


def noise_axes(eigenvectors: np.ndarray, sigma: np.ndarray, std: float) -> np.ndarray:
    """Returns f32[3,3], whose column k is the color noise for z_k = 1 (§4.1): std * sigma_k * v_k."""
    return np.asarray(std * sigma[None] * eigenvectors, np.float32)


def normalize(images, mean, noise=None, rescale: float = 1.0) -> jax.Array:
    """Returns (images u8[B,H,W,3] - mean f32[H,W,3] + noise f32[B,3]) / rescale -> f32[B,H,W,3]."""
    x = images.astype(jnp.float32) - mean[None]
    if noise is None:
        return x
    return (x + noise[:, None, None, :]) / rescale


def make_inputs(
    *, mean: np.ndarray, eigenvectors: np.ndarray, sigma: np.ndarray, std: float, rescale: bool
) -> Callable:
    """Returns inputs(batch, rates) -> f32[B,H,W,3], what the network sees in training.

    With 'jitter' f32[B,3], brightness, contrast and saturation are multiplied by those, in this order, and
    clipped to 0..255. With 'mix' f32[B], each image gets that share, and the other row of its pair (its row
    in the global batch XOR 1) the rest (mixup, Zhang et al. 2018).

    mean f32[H,W,3], eigenvectors f32[3,3] (columns) and sigma f32[3] come from the store, std and
    rescale from `config.colour`.
    """
    axes = noise_axes(eigenvectors, sigma, std)

    def inputs(batch, rates):
        noise = rates['colour'] * batch['z'] @ axes.T
        divisor = jnp.where(rates['colour'] > 0, 1 + std, 1.0) if rescale and std else 1.0
        images = _jitter(batch['image'], batch['jitter']) if 'jitter' in batch else batch['image']
        x = normalize(images, mean, noise if std else None, divisor)
        return _mix(x, batch['mix'][:, None, None, None]) if 'mix' in batch else x

    return inputs


def _jitter(images, factors):
    brightness, contrast, saturation = jnp.split(factors[:, :, None, None], 3, axis=1)

    def gray(x):
        return x @ jnp.array([0.299, 0.587, 0.114], x.dtype)  # ITU-R 601, as torchvision

    x = jnp.clip(images.astype(jnp.float32) * brightness, 0, 255)
    means = jnp.mean(gray(x), axis=(1, 2))[:, None, None, None]
    x = jnp.clip(means + contrast * (x - means), 0, 255)
    each = gray(x)[..., None]
    return jnp.clip(each + saturation * (x - each), 0, 255)


def _mix(x, share):
    """Mixes each row of x [B,...], B even, with its pair's other row."""
    other = jnp.flip(x.reshape(-1, 2, *x.shape[1:]), axis=1).reshape(x.shape)
    return share * x + (1 - share) * other


def truth(batch, classes: int, smoothing: float) -> jax.Array:
    """Returns a batch's target probabilities f32[B,K], mixed like `make_inputs`.

    smoothing: the part spread evenly over all classes (Szegedy et al. 2016).
    """
    # One-hot, because the gradient of indexing is a scatter, which is slow when deterministic.
    wanted = jax.nn.one_hot(batch['label'], classes)
    if 'mix' in batch:
        wanted = _mix(wanted, batch['mix'][:, None])
    return optax.smooth_labels(wanted, smoothing) if smoothing else wanted


def apply_loss(net: Network, variables, x, wanted, seed: int, step, rows, frozen=()):
    """Runs the net in training mode -> losses f32[B] (nats), logits f32[B,K], activations, batch_stats.

    x f32[B,H,W,3]: see `make_inputs`; wanted f32[B,K]: see `truth`.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    train = network.Training(key, rows, tuple(frozen))
    logits, out, batch_stats = network.apply(net, variables, x, train)
    wanted = wanted.astype(logits.dtype)
    return optax.softmax_cross_entropy(logits, wanted), logits, out, batch_stats


def abstract_state(net: Network, optimizer, mesh: Mesh, crop: int, ema: bool = False) -> TrainState:
    """Returns the shapes and shardings of the state on a mesh, for `init_state` and checkpoints."""
    shapes = jax.eval_shape(lambda: _init(net, optimizer, 0, crop, ema))
    return meshes.place(mesh, shapes, state_specs(net, shapes, mesh))


def abstract_variables(net: Network, mesh: Mesh, crop: int) -> dict:
    """Returns the shapes and shardings of {'params', 'batch_stats'} on a mesh."""
    shapes = network.shapes(net, crop)
    return meshes.place(mesh, shapes, _variable_specs(net, shapes, mesh))


def _init(net, optimizer, seed, crop, ema):
    variables = network.init(net, jax.random.key(seed), crop)
    params, batch_stats = variables['params'], variables['batch_stats']
    average = jax.tree.map(jnp.copy, variables) if ema else None
    return TrainState(
        jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params), average
    )


def _variable_specs(net: Network, variables: dict, mesh: Mesh) -> dict:
    shards = mesh.shape['model']
    return {name: network.specs(net, tree, shards) for name, tree in variables.items()}


def state_specs(net: Network, state: TrainState, mesh: Mesh) -> TrainState:
    """Returns the partition spec of every leaf; trees like the parameters are divided like them."""
    specs = _variable_specs(net, state.variables, mesh)
    structure = jax.tree.structure(state.params)

    def like_params(x):
        return jax.tree.structure(x) == structure

    opt_specs = jax.tree.map(
        lambda x: specs['params'] if like_params(x) else P(), state.opt_state, is_leaf=like_params
    )
    ema = specs if state.ema else None
    return TrainState(P(), specs['params'], specs['batch_stats'], opt_specs, ema)


def init_state(
    net: Network, optimizer, mesh: Mesh, *, seed: int, crop: int, ema: bool = False
) -> TrainState:
    """Returns a fresh state, the same on every mesh; ema: with a moving average."""
    target = abstract_state(net, optimizer, mesh, crop, ema)
    shardings = jax.tree.map(lambda x: x.sharding, target)
    return jax.jit(lambda: _init(net, optimizer, seed, crop, ema), out_shardings=shardings)()


def make_train_step(
    net: Network,
    optimizer,
    mesh: Mesh,
    *,
    seed: int,
    freeze: Sequence[str] = (),
    several: bool = False,
    smoothing: float = 0.0,
    ema: float = 0.0,
    **inputs_of,
) -> Callable:
    """Returns step(state, batch, rates) -> (state, sums), one update on a global batch.

    batch: {'image': u8[B,H,W,3], 'z': f32[B,3], 'label': i32[B]}, divided over `data`, and perhaps
    'mix' and 'jitter' (`make_inputs`); rates: f32 scalars by name. sums: those of `metrics.count` over
    the batch, in training mode, for the images' own labels. If the loss is not finite, nothing is
    updated, so that `diagnosis` can find the cause. The state is donated, except on CPUs.

    Args:
      freeze: layers whose running statistics do not change; the optimizer freezes their parameters.
      several: make several updates in one program, none after a loss that is not finite; every array
        in batch, rates and sums then has a leading axis, the updates.
      smoothing: see `truth`.
      ema: how much of the moving average a step keeps, at most; less at the start, like TensorFlow's:
        (1 + step) / (10 + step).
      inputs_of: the arguments of `make_inputs`.
    """
    choices = backend.choices(mesh)
    alone = mesh.size == 1  # nothing to exchange: even a sum over one device copies every gradient
    local = net.local(mesh.shape['model'], None if alone else 'data')
    target = abstract_state(net, optimizer, mesh, inputs_of['mean'].shape[0], ema > 0)
    specs = jax.tree.map(lambda x: x.sharding.spec, target)
    inputs = make_inputs(**inputs_of)

    def step(state, batch, rates):
        labels, size = batch['label'], batch['label'].shape[0]
        rows = jnp.arange(size) + (0 if alone else lax.axis_index('data') * size)
        x, wanted = inputs(batch, rates), truth(batch, net.classes, smoothing)

        def loss(params):
            variables = {'params': params, 'batch_stats': state.batch_stats}
            losses, logits, _, batch_stats = apply_loss(
                local, variables, x, wanted, seed, state.step, rows, freeze
            )
            # Divided by the global batch, because gradients of replicated parameters arrive summed.
            return jnp.sum(losses) / (size * mesh.shape['data']), (logits, losses, batch_stats)

        grads, (logits, losses, batch_stats) = jax.grad(loss, has_aux=True)(state.params)
        sums = metrics.count(logits, losses, labels, jnp.ones_like(losses))
        sums = sums if alone else lax.psum(sums, 'data')
        finite = jnp.isfinite(sums['loss'])
        rates = {name: jnp.where(finite, rate, 0.0) for name, rate in rates.items()}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, rates=rates)
        params = optax.apply_updates(state.params, updates)
        batch_stats = _hold(finite, batch_stats, state.batch_stats)
        new = TrainState(state.step + 1, params, batch_stats, opt_state)
        if ema:
            count = state.step.astype(jnp.float32)
            keep = jnp.minimum(jnp.float32(ema), (1 + count) / (10 + count))
            moved = jax.tree.map(lambda a, x: x + keep * (a - x), state.ema, new.variables)
            new = new.replace(ema=_hold(finite, moved, state.ema))
        return new, sums

    mapped = backend.on(mesh, step)
    if not alone:
        in_specs, out_specs = (specs, P('data'), P()), (specs, P())
        mapped = jax.shard_map(
            mapped, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True
        )

    def chain(state, batches, rates):
        def one(carry, inputs):
            (state, finite), (batch, rates) = carry, inputs
            rates = {name: jnp.where(finite, rate, 0.0) for name, rate in rates.items()}
            new, sums = mapped(state, batch, rates)
            held = {name: getattr(new, name) for name in ('batch_stats', 'ema')}
            held = {name: _hold(finite, x, getattr(state, name)) for name, x in held.items()}
            new = new.replace(**held)
            return (new, finite & jnp.isfinite(sums['loss'])), sums

        (state, _), sums = lax.scan(one, (state, True), (batches, rates), unroll=not choices.loop)
        return state, sums

    out = meshes.shardings(mesh, specs), NamedSharding(mesh, P())
    donated = 0 if choices.donate else ()
    return jax.jit(chain if several else mapped, donate_argnums=donated, out_shardings=out)


def make_modes(
    net: Network,
    *,
    seed: int,
    freeze: Sequence[str] = (),
    smoothing: float = 0.0,
    **inputs_of,
) -> Callable:
    """Returns modes(variables, step, batch, rates) -> mean loss in training and in test mode, f32[2].

    Both use the same inputs; a large difference means that the running statistics do not fit the data.
    Works on any mesh; arguments: see `make_train_step`.
    """
    inputs = make_inputs(**inputs_of)

    @jax.jit
    def modes(variables, step, batch, rates):
        x, wanted = inputs(batch, rates), truth(batch, net.classes, smoothing)
        losses, *_ = apply_loss(net, variables, x, wanted, seed, step, jnp.arange(len(x)), freeze)
        logits, *_ = network.apply(net, variables, x)
        tested = optax.softmax_cross_entropy(logits, wanted.astype(logits.dtype))
        return jnp.stack([jnp.mean(losses), jnp.mean(tested)])

    return modes


def make_statistics(
    net: Network, *, seed: int, freeze: Sequence[str] = (), **inputs_of
) -> Callable:
    """Returns statistics(variables, step, batch, rates) -> batch_stats of this batch alone.

    Those of frozen layers are those of `variables`. Works on any mesh; arguments: see `make_train_step`.
    """
    inputs = make_inputs(**inputs_of)

    @jax.jit
    def statistics(variables, step, batch, rates):
        x = inputs(batch, rates)
        key = jax.random.fold_in(jax.random.key(seed), step)
        train = network.Training(key, jnp.arange(len(x)), frozen=freeze, momentum=0.0)
        return network.apply(net, variables, x, train)[2]

    return statistics


def recompute_statistics(
    statistics: Callable, variables: dict, batches, freeze: Sequence[str] = ()
) -> dict:
    """Returns new batch_stats: the mean and the variance over several batches of equal size.

    Frozen layers keep theirs. statistics: see `make_statistics`; batches: (step, batch, rates) of each.
    ShuffleNet's authors do so after training.
    """

    def squares(stats):  # var becomes the mean of squares, which can be averaged
        return _with_var(stats, lambda mean, var: var + mean**2)

    total, count = None, 0
    for step, batch, rates in batches:
        one = squares(statistics(variables, step, batch, rates))
        total = one if total is None else jax.tree.map(jnp.add, total, one)
        count += 1
    mean = jax.tree.map(lambda x: x / count, total)
    new = _with_var(mean, lambda mean, var: jnp.maximum(var - mean**2, 0))

    def kept(path, old, new):
        return old if network.inside(network.names_of(path), freeze) else new

    return jax.tree.map_with_path(kept, variables['batch_stats'], new)


def _with_var(stats: dict, function: Callable) -> dict:
    """Replaces every 'var' in a tree with function(mean, var), from the 'mean' beside it."""
    if 'var' in stats:
        return {**stats, 'var': function(stats['mean'], stats['var'])}
    return {name: _with_var(inner, function) for name, inner in stats.items()}


def _hold(update, new, old):
    """Returns the new tree where `update` is true, else the old one."""
    return jax.tree.map(lambda n, o: jnp.where(update, n, o), new, old)


def make_predict(net: Network, mesh: Mesh, *, mean: np.ndarray, views: str, crop: int) -> Callable:
    """Returns predict(variables, images u8[B,S,S,3]) -> probabilities f32[B,K], averaged over views.

    views: 'center' or 'ten' (§4.1). Images are cropped to `crop` pixels and flipped on the device,
    one view at a time.
    """
    local = net.local(mesh.shape['model'], 'data')
    window = central(mean, crop)

    def predict(variables, images):
        room = images.shape[1] - crop
        plan = VIEWS[views]

        def probabilities(view):
            y, x, flip = view
            shape = (images.shape[0], crop, crop, 3)
            crops = lax.dynamic_slice(images, (0, y, x, 0), shape)
            crops = jnp.where(flip, crops[:, :, ::-1], crops)
            logits, *_ = network.apply(local, variables, normalize(crops, window))
            return jax.nn.softmax(logits.astype(jnp.float32))

        ys, xs = (jnp.array([int(v[axis] * room) for v in plan]) for axis in (0, 1))
        flips = jnp.array([v[2] for v in plan])
        return jnp.mean(lax.map(probabilities, (ys, xs, flips)), axis=0)

    return _forward(predict, net, mesh, crop, P('data'))


def _forward(function: Callable, net: Network, mesh: Mesh, crop: int, out: P) -> Callable:
    """Returns function(variables, images) compiled for a mesh; out: how its result is divided."""
    specs = _variable_specs(net, network.shapes(net, crop), mesh)
    mapped = jax.shard_map(
        backend.on(mesh, function),
        mesh=mesh,
        in_specs=(specs, P('data')),
        out_specs=out,
        check_vma=True,
    )
    return jax.jit(mapped, out_shardings=NamedSharding(mesh, out))


def activations(net: Network, crop: int) -> dict:
    """Returns the shapes of the activations of one image by name, in the order of the forward pass."""
    names = []

    def forward(variables):
        _, out, _ = network.apply(net, variables, jnp.zeros((1, crop, crop, 3)))
        names.extend(out)  # JAX sorts the keys of what it returns
        return out

    shapes = jax.eval_shape(forward, network.shapes(net, crop))
    return {name: shapes[name] for name in names}


def make_features(
    net: Network, mesh: Mesh, *, mean: np.ndarray, crop: int, layer: str | None = None
) -> Callable:
    """Returns features(variables, images u8[B,S,S,3]) -> f32[B,...], of the center crop in test mode.

    layer: the activation by its name in `net.names`, f32[B,H,W,C] or f32[B,F] with the channels of all
    towers in order; the last name means the logits. None: the last one before the logits (fc7 in the paper's
    network, §6.1), before dropout halves it. Raises UserError for other names.
    """
    there = activations(net, crop)
    layer = layer or [*there][-1]
    choose('layer', layer, [*there, net.names[-1]])
    local = net.local(mesh.shape['model'], 'data')
    window = central(mean, crop)

    def features(variables, images):
        logits, out, _ = network.apply(local, variables, normalize(central(images, crop), window))
        values = out.get(layer, logits)
        values = values if isinstance(values, tuple) else (values,)
        return jnp.concatenate(values, axis=-1).astype(jnp.float32)

    shape, spec = there.get(layer), P('data')
    if isinstance(shape, tuple):  # of the towers
        spec = P('data', *[None] * (shape[0].ndim - 2), 'model')
    return _forward(features, net, mesh, crop, spec)


@functools.cache
def make_score(mesh: Mesh) -> Callable:
    """Returns score(probabilities f32[B,K], labels i32[B], mask f32[B]) -> sums over the whole batch.

    The sums are those of `metrics.count`, also by class.
    """
    tiny = jnp.finfo(jnp.float32).tiny  # keeps the logarithm of probability 0 finite

    def score(probabilities, labels, mask):
        true = jnp.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0]
        losses = -jnp.log(jnp.maximum(true, tiny))
        return metrics.count(probabilities, losses, labels, mask, by_class=True)

    return jax.jit(score, out_shardings=NamedSharding(mesh, P()))


def all_finite(tree) -> jax.Array:
    """Returns whether all values in a tree of arrays are finite, bool[]."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def make_all_finite(mesh: Mesh) -> Callable:
    """Returns `all_finite`, compiled for arrays on a mesh."""
    return jax.jit(all_finite, out_shardings=NamedSharding(mesh, P()))
