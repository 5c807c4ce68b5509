"""Prints a network's layers: shapes, parameters and multiply-adds for one image.

    python -m alexnet_jax.summary --config=configs/paper.py [--config.model.width=0.5 ...]

Multiply-adds are those of convolutions and products with kernels, as papers count them; biases, norms,
activations and pooling are not counted. --classes=N counts the last layer for N classes.
"""

from alexnet_jax import command
from alexnet_jax.common.errors import UserError


def main() -> None:
    parser = command.make_parser('summary', __doc__)
    parser.add_argument(
        '--config', required=True, help='a preset or your own file; :VARIANT may follow'
    )
    parser.add_argument('--classes', type=int, default=1000, help='number of classes')
    args, changes = parser.parse_known_args()
    if args.classes < 1:
        raise UserError(f'--classes={args.classes}: must be at least 1')

    from alexnet_jax.nets import network
    from alexnet_jax.nets.build import build

    config = command.config(args.config, changes)
    net = build(classes=args.classes, **config.model)
    layers = network.summary(net, config.augment.crop)
    print(f'{"layer":32}{"output":>24}{"parameters":>14}{"multiply-adds":>16}')
    for layer in layers:
        output = ' x '.join(map(str, layer.output))
        print(f'{layer.name:32}{output:>24}{layer.parameters:14,}{layer.macs:16,}')
    parameters, macs = (sum(getattr(x, n) for x in layers) for n in ('parameters', 'macs'))
    print(f'{"total":32}{"":24}{parameters:14,}{macs:16,}')


if __name__ == '__main__':
    command.run(main)
