"""The benchmark's PyTorch worker: the same network with the same parameters, in several PyTorch variants.

It runs in a Python with PyTorch and NumPy and imports nothing from the library. Activations are [B,C,H,W]
with the channels of all towers, tower by tower; parameters arrive in the library's layout.
"""

import sys
import time
import types

import numpy as np
import torch
import torch.nn.functional as F

from experiments.benchmark import protocol

GROUPED = ('conv2', 'conv4', 'conv5')


def weights(layer: str, name: str, x: np.ndarray, side: int) -> np.ndarray:
    """Converts a parameter from the library's layout to PyTorch's; side: size of the maps that fc6 reads."""
    if name == 'bias':
        return x.reshape(-1)
    if layer.startswith('conv'):  # [T,k,k,I,O] -> [T*O,I,k,k]
        return np.concatenate([kernel.transpose(3, 2, 0, 1) for kernel in x])
    if layer == 'fc8':  # [T,I,K] -> [K,T*I]
        return x.reshape(-1, x.shape[-1]).T
    if layer == 'fc6':  # inputs (h, w, c) -> (c, h, w)
        x = x.reshape(len(x), side, side, -1, x.shape[-1]).transpose(0, 3, 1, 2, 4)
        x = x.reshape(len(x), -1, x.shape[-1])
    return np.concatenate([kernel.T for kernel in x])


class Net(torch.nn.Module):
    """The network described by `net`, which has the fields of `alexnet_jax.nets.alexnet.AlexNet`."""

    def __init__(
        self, net: dict, params: dict[str, np.ndarray], lrn: str, layout: torch.memory_format
    ):
        super().__init__()
        self.net, self.lrn, self.layout = net, lrn, layout
        self.convs = sum(name.endswith('kernel') and 'conv' in name for name in params)
        inputs, channels = params['fc6/kernel'].shape[1], params[f'conv{self.convs}/bias'].size
        channels = channels if 'fc6' in net['exchange'] else channels // net['towers']
        self.side = round((inputs / channels) ** 0.5)
        for name, x in params.items():
            x = torch.from_numpy(weights(*name.split('/'), x, self.side).copy())
            self.register_parameter(name.replace('/', '_'), torch.nn.Parameter(x))

    def forward(self, images, training: bool):
        net = self.net
        x = (images.permute(0, 3, 1, 2) - net['mean']).contiguous(memory_format=self.layout)
        before, after = net['conv1_padding']
        x = F.pad(x, (before, after, before, after))
        for i in range(self.convs):
            name = f'conv{i + 1}'
            groups = 1 if i == 0 or name in net['exchange'] else net['towers']
            groups *= net['groups'] if name in GROUPED else 1
            x = F.conv2d(
                x,
                self.get(name, 'kernel'),
                self.get(name, 'bias'),
                groups=groups,
                stride=4 if i == 0 else 1,
                padding=(0, 2, 1, 1, 1, 1)[i],
            )
            for op in net['after'][i].split():
                x = self.after(op, x)
        x = x.flatten(1)
        for name in ('fc6', 'fc7'):
            x = self.dropout(x, training) if net['dropout_at'] == 'inputs' else x
            x = self.act(self.dense(name, x))
            x = self.dropout(x, training) if net['dropout_at'] == 'outputs' else x
        return F.linear(x, self.get('fc8', 'kernel'), self.get('fc8', 'bias')).float()

    def get(self, layer, name):
        return getattr(self, f'{layer}_{name}')

    def converted(self, name, x):
        return weights(*name.split('/'), x, self.side)

    def gradient(self, name):
        return self.get(*name.split('/')).grad

    def act(self, x):
        return {'relu': F.relu, 'tanh': torch.tanh}[self.net['activation']](x)

    def dense(self, name, x):
        kernel, bias, towers = self.get(name, 'kernel'), self.get(name, 'bias'), self.net['towers']
        if name in self.net['exchange'] or towers == 1:
            return F.linear(x, kernel, bias)
        parts = zip(x.chunk(towers, 1), kernel.chunk(towers), bias.chunk(towers), strict=True)
        return torch.cat([F.linear(*part) for part in parts], 1)

    def after(self, op, x):
        net = self.net
        if op == 'act':
            return self.act(x)
        if op == 'pool':
            return F.max_pool2d(
                x, *((3, 2) if net['pooling'] == 'overlapping' else (2, 2)), ceil_mode=True
            )
        if op == 'map_norm':
            return x / self.factor((1 + 0.001 * F.avg_pool2d(x * x, 5, 1, 2)) ** 0.75, x)
        towers = net['towers'] if net['norm_window'] == 'tower' else 1
        return (
            torch.cat([self.norm(part) for part in x.chunk(towers, 1)], 1)
            if towers > 1
            else self.norm(x)
        )

    def norm(self, x):
        alpha, k, n, beta = (self.net['norm'][name] for name in ('alpha', 'k', 'n', 'beta'))
        if self.lrn == 'builtin':
            return F.local_response_norm(x, n, alpha * n, beta, k)
        squares = F.pad(x * x, (0, 0, 0, 0, n // 2, n // 2))
        sums = sum(squares[:, i : i + x.shape[1]] for i in range(n))
        r = torch.rsqrt(k + alpha * sums)
        return x * self.factor(r * torch.sqrt(r) if beta == 0.75 else r ** (2 * beta), x)

    def factor(self, factor, x):
        """Casts a norm's factor: autocast on GPUs makes roots and powers float32, and x would follow."""
        return factor if self.lrn == 'builtin' else factor.to(x.dtype)

    def dropout(self, x, training):
        kind = self.net['dropout']
        if kind == 'none':
            return x
        if kind == 'inverted':
            return F.dropout(x, 0.5, training)
        return 0.5 * (F.dropout(x, 0.5) if training else x)  # PyTorch scales by 2 in training


class Torchvision(torch.nn.Module):
    """A network of torchvision's, with these parameters and statistics."""

    def __init__(
        self, net: dict, state: dict[str, np.ndarray], classes: int, layout: torch.memory_format
    ):
        super().__init__()
        self.net, self.mean, self.layout = net, net['mean'], layout
        self.model = _constructor(net['torchvision'])(weights=None, num_classes=classes)
        self.model.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in state.items()})
        self.dropouts = [m for m in self.modules() if isinstance(m, torch.nn.Dropout)]

    def forward(self, images, training: bool):
        del training  # the module's own mode, set by `prepare`
        x = images.permute(0, 3, 1, 2) - self.mean
        return self.model(x.contiguous(memory_format=self.layout)).float()

    def converted(self, name: str, x: np.ndarray) -> np.ndarray:
        return x

    def gradient(self, name: str):
        parameter = dict(self.model.named_parameters()).get(name)
        return None if parameter is None else parameter.grad


def _constructor(name: str):
    """torchvision.models' constructor; its GPU wheels lack operators that no network needs."""
    try:
        from torchvision import models
    except RuntimeError:
        for module in ('_meta_registrations', '_autograd_registrations'):
            sys.modules[f'torchvision.{module}'] = types.ModuleType(module)
        from torchvision import models
    return getattr(models, name)


def prepare(spec: dict):
    """Prepares a training step, or prediction, for `protocol.serve`."""
    torch.set_num_threads(spec['threads'])
    torch.manual_seed(0)
    device = 'cpu' if spec['cpu'] else 'cuda'
    tf32 = not spec['cpu'] and spec['dtype'] == 'float32'
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True
    if spec['task'] == 'matmul':
        return _matmul(device, spec['dtype'])
    with np.load(spec['file']) as file:
        arrays = dict(file)
    params = {k.removeprefix('params/'): v for k, v in arrays.items() if k.startswith('params/')}
    layout = torch.channels_last if spec['layout'] == 'channels_last' else torch.contiguous_format
    if 'torchvision' in spec['net']:
        net = Torchvision(spec['net'], params, arrays['logits'].shape[1], layout)
    else:
        _supported(spec['net'])
        net = Net(spec['net'], params, spec['lrn'], layout)
    net = net.train(spec['task'] == 'train').to(device).to(memory_format=layout)
    call = torch.compile(net, dynamic=False) if spec['mode'] == 'compile' else net
    images = torch.from_numpy(arrays['images']).to(device)
    labels = torch.from_numpy(arrays['labels'].astype(np.int64)).to(device)

    def run(images, training):
        with torch.autocast(device, torch.bfloat16, enabled=spec['dtype'] == 'bfloat16'):
            return call(images, training)

    def forward_backward():
        F.cross_entropy(run(images, True), labels).backward()

    # Compilation is timed before `_check`, which compiles many of the same kernels.
    began = time.monotonic()
    if spec['task'] == 'train':
        forward_backward()
        net.zero_grad(set_to_none=True)
    else:
        with torch.inference_mode():
            run(images, False)
    if device == 'cuda':
        torch.cuda.synchronize()
    compile_s = time.monotonic() - began
    differences = _check(run, net, arrays, images, labels)
    if spec['task'] == 'train':
        kernels, biases = (
            [p for p in net.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)
        )
        groups = [{'params': kernels, 'weight_decay': 5e-4}, {'params': biases, 'weight_decay': 0}]
        optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, fused=not spec['stock'] or None)

        def once():
            optimizer.zero_grad(set_to_none=True)
            forward_backward()
            optimizer.step()
    else:

        @torch.inference_mode()
        def once():
            run(images, False).softmax(1)

    def repeat(count):
        for _ in range(count):
            once()
        if device == 'cuda':
            torch.cuda.synchronize()

    def peak():
        on_cpu = device == 'cpu'
        return (
            protocol.peak_memory() if on_cpu else {'peak_bytes': torch.cuda.max_memory_allocated()}
        )

    facts = {'compile_s': compile_s, 'torch': torch.__version__, **differences}
    return repeat, facts, {'peak': peak}


def _matmul(device: str, dtype: str):
    """Prepares products of large matrices, as `ours._matmul` does: oneDNN's can be faster than XLA's."""
    size = 3072 if device == 'cpu' else 8192
    x, y = torch.randn(2, size, size, device=device, dtype=getattr(torch, dtype))

    def repeat(count):
        for _ in range(count):
            x @ y
        if device == 'cuda':
            torch.cuda.synchronize()

    return repeat, {'flops': 2 * size**3}, {}


def _supported(net: dict) -> None:
    if net['activation'] not in ('relu', 'tanh'):
        raise SystemExit(f'the peer does not support the activation {net["activation"]}')
    if net['remove'] != 'none' or net['pooling'] != 'overlapping':
        raise SystemExit('the peer does not support removed layers or disjoint pooling')


def _check(run, net, arrays, images, labels) -> dict:
    """Returns the distance of our logits, and of the worst gradient, from the library's."""
    training, dropouts = net.training, getattr(net, 'dropouts', ())
    rates = [module.p for module in dropouts]
    for module in dropouts:
        module.p = 0.0
    net.train('torchvision' in net.net)  # with batch normalization, test mode checks too little
    logits = run(images, False)
    F.cross_entropy(logits, labels).backward()
    pairs = []
    for name, x in arrays.items():
        kind, _, name = name.partition('/')
        if kind == 'gradients' and (mine := net.gradient(name)) is not None:
            pairs.append((mine.float().cpu().numpy(), net.converted(name, x)))
    if 'torchvision' in net.net:  # the gradient of what a normalization removes is only rounding
        pairs = [[np.concatenate([x.ravel() for x in each]) for each in zip(*pairs, strict=True)]]
    worst = max(protocol.distance(*pair) for pair in pairs)
    net.zero_grad(set_to_none=True)
    net.train(training)
    for module, rate in zip(dropouts, rates, strict=True):
        module.p = rate
    mine, theirs = logits.detach().float().cpu().numpy(), arrays['logits']
    return {
        'logits_difference': protocol.distance(mine, theirs),
        'gradients_difference': worst,
    }


if __name__ == '__main__':
    protocol.serve(prepare)
