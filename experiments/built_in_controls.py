"""Shows that the built-in dataset needs a network: simpler classifiers fail on it.

    python -m experiments.built_in_controls              # twenty minutes on two cores
    python -m experiments.built_in_controls --seeds=0    # without the networks: two minutes

Each control is trained on the 2000 training images and tested on the other 1000; chance is 90%. The error
of a control must exceed its bound. The networks are variants of the quickstart, with several seeds. If
interrupted, repeat the command to resume.
"""

import pathlib
from typing import NamedTuple

import numpy as np

from alexnet_jax.command import ArgumentParser, Help, run
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.input.images import decode, square
from alexnet_jax.input.sources import shapes
from alexnet_jax.training import evaluation, loop, metrics, steps
from configs import quickstart
from experiments import statistics

CROPS = {'center': 'center crop', 'ten': 'ten crops'}
PIXELS = 32  # a side, for the regression
NEIGHBORS = 25


class Split(NamedTuple):
    """The features available to the controls."""

    pixels: np.ndarray  # u8[N,32,32,3]
    color: np.ndarray  # f64[N,3], mean of each image
    file: np.ndarray  # f64[N,3]: bytes, width, height
    box: np.ndarray  # f64[N,4]: center and sides of the figure's bounding box
    labels: np.ndarray  # i64[N]


def load(name: str) -> Split:
    """Renders a split of the built-in dataset."""
    number, count = shapes.SPLITS[name]
    rows = []
    for index in range(count):
        data, label, (x0, y0, x1, y1) = shapes.render(shapes.SEED, number, index)
        image = decode(data)
        rows.append(
            (
                square(data, PIXELS),
                np.asarray(image).mean((0, 1)),
                (len(data), *image.size),
                (x0 + x1, y0 + y1, x1 - x0, y1 - y0),
                label,
            )
        )
    return Split(*(np.array(column) for column in zip(*rows, strict=True)))


def error(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Returns the top-1 error, %."""
    return 100 * float(np.mean(predicted != labels))


def nearest_mean(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Predicts the class with the nearest mean, f64[M,F] -> i64[M]."""
    means = np.array([train[labels == label].mean(0) for label in range(labels.max() + 1)])
    return ((test[:, None] - means) ** 2).sum(-1).argmin(1)


def nearest_neighbors(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Predicts the majority of the nearest neighbors by standardized features, f64[M,F] -> i64[M]."""
    mean, scale = train.mean(0), train.std(0)
    distances = ((((test - mean) / scale)[:, None] - (train - mean) / scale) ** 2).sum(-1)
    votes = labels[distances.argpartition(NEIGHBORS, axis=1)[:, :NEIGHBORS]]
    return (votes[:, :, None] == np.arange(labels.max() + 1)).sum(1).argmax(1)


def regression(train: np.ndarray, labels: np.ndarray, test: np.ndarray, decay: float) -> np.ndarray:
    """Predicts by multinomial logistic regression on u8 images, with weight decay and L-BFGS -> i64[M]."""
    x, y = (part.reshape(len(part), -1).astype(np.float32) / 64 - 2 for part in (train, test))
    truth = np.eye(labels.max() + 1, dtype=np.float32)[labels]
    shape = (x.shape[1], truth.shape[1])

    def loss(flat):
        weights = flat[: -shape[1]].reshape(shape).astype(np.float32)
        logits = x @ weights + flat[-shape[1] :].astype(np.float32)
        logits -= logits.max(1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        wrong = (np.exp(log_p) - truth) / len(x)
        gradient = np.concatenate([(x.T @ wrong + decay * weights).ravel(), wrong.sum(0)])
        value = -(truth * log_p).sum() / len(x) + decay / 2 * (weights**2).sum()
        return float(value), gradient.astype(np.float64)

    best = (
        statistics.scipy('optimize')
        .minimize(
            loss,
            np.zeros(shape[0] * shape[1] + shape[1]),
            jac=True,
            method='L-BFGS-B',
            options={'maxiter': 100},
        )
        .x
    )
    return (y @ best[: -shape[1]].reshape(shape) + best[-shape[1] :]).argmax(1)


def controls(train: Split, test: Split) -> list[tuple[str, float, float]]:
    """Runs the controls without a network -> (name, bound %, error %) of each.

    The weight decay of the regression is the best of three on the test images, which favors it.
    """
    labels = train.labels
    return [
        (
            'nearest mean color',
            80,
            error(nearest_mean(train.color, labels, test.color), test.labels),
        ),
        (
            f'{NEIGHBORS} neighbors by mean color',
            80,
            error(nearest_neighbors(train.color, labels, test.color), test.labels),
        ),
        (
            f'{NEIGHBORS} neighbors by file size',
            80,
            error(nearest_neighbors(train.file[:, :1], labels, test.file[:, :1]), test.labels),
        ),
        (
            f'{NEIGHBORS} neighbors by file size and image sides',
            80,
            error(nearest_neighbors(train.file, labels, test.file), test.labels),
        ),
        (
            f"{NEIGHBORS} neighbors by the figure's position and size",
            80,
            error(nearest_neighbors(train.box, labels, test.box), test.labels),
        ),
        (
            f'logistic regression on {PIXELS}x{PIXELS} pixels',
            60,
            min(
                error(regression(train.pixels, labels, test.pixels, decay), test.labels)
                for decay in (0.01, 0.1, 1.0)
            ),
        ),
    ]


# Changes to the quickstart's network, and how many points worse they must make it.
NETWORKS = {
    'the quickstart': ({}, 0.0),
    'without crops and flips': ({'augment.random': False}, 0.0),
    'its conv layers frozen': ({'train.freeze': tuple(f'conv{i}' for i in range(1, 6))}, 20.0),
}


def networks(seeds: int, root: pathlib.Path) -> dict[str, dict[str, list[float]]]:
    """Trains or resumes each network with each seed -> {view: {network: top-1 errors, %}}."""
    results = {view: {name: [] for name in NETWORKS} for view in steps.VIEWS}
    for seed in range(seeds):
        for name, (changes, _) in NETWORKS.items():
            config = quickstart.get_config()
            config.seed = seed
            config.update_from_flattened_dict(changes)
            run_dir = root / f'{name.replace(" ", "_")}-{seed}'
            loop.train(config, run_dir)
            for (_, view), sums in evaluation.compare([run_dir]).items():
                results[view][name].append(metrics.values(sums)['top1_error'])
    return results


def corrected(of_views: dict[str, dict[str, list[float]]]) -> dict[tuple[str, str], float]:
    """Returns p values of no difference from the quickstart, corrected by Holm over the views."""
    found = {}
    for name in [*NETWORKS][1:]:
        p = {
            view: statistics.paired(np.subtract(results[name], results['the quickstart'])).p
            for view, results in of_views.items()
        }
        found |= {(name, view): value for view, value in statistics.holm(p).items()}
    return found


def main() -> None:
    parser = ArgumentParser(
        prog='python -m experiments.built_in_controls', description=__doc__, formatter_class=Help
    )
    parser.add_argument('--seeds', type=int, default=3, help='seeds per network; 0: no networks')
    parser.add_argument(
        '--workdir',
        type=pathlib.Path,
        default=pathlib.Path('runs/built_in_controls'),
        help='folder for the runs',
    )
    args = parser.parse_args()
    meshes.configure(cpu_devices=2)
    print(f'{"control":<50}{"at least %":>12}{"error %":>10}')
    for name, bound, value in controls(load('train'), load('validation')):
        print(f'{name:<50}{bound:>12}{value:>10.1f}{"" if value >= bound else "  TOO LOW"}')
    if not args.seeds:
        return
    of_views = networks(args.seeds, args.workdir)
    p = corrected(of_views)
    for view, results in of_views.items():
        print(
            f'\nNetworks, {CROPS[view]}. "worse by": paired by seed, with 95% interval; p: corrected by '
            f'Holm for {len(of_views)} views.'
        )
        print(f'{"network":<28}{"error % by seed":<44}{"mean ± std":>14}{"worse by":>26}{"p":>9}')
        for name, errors_ in results.items():
            worse = np.array(errors_) - np.array(results['the quickstart'])
            each = ' '.join(f'{e:.1f}' for e in errors_)
            each_p = f'{p[name, view]:.2g}' if (name, view) in p else ''
            low = name != 'the quickstart' and worse.mean() <= NETWORKS[name][1]
            print(
                f'{name:<28}{each:<44}{statistics.mean_std(errors_):>14}'
                f'{statistics.interval(statistics.paired(worse), 1):>26}{each_p:>9}'
                f'{"  TOO LOW" if low else ""}'
            )


if __name__ == '__main__':
    run(main)
