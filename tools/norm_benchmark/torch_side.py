"""What a worker of PyTorch runs: the same networks, layers and steps as those of mxnet_side, in torch.nn."""
import contextlib
import functools
import math
import time

import torch
from torch import nn
from torch.nn import functional


class Bottleneck(nn.Module):
    """That of gn_gluon.models.resnet."""

    def __init__(self, norm, in_channels, channels, stride):
        super().__init__()
        inner = channels // 4
        self.conv1, self.norm1 = _convolution(in_channels, inner, 1), norm(inner)
        self.conv2, self.norm2 = _convolution(inner, inner, 3, stride), norm(inner)
        self.conv3, self.norm3 = _convolution(inner, channels, 1), norm(channels)
        nn.init.zeros_(self.norm3.weight)
        self.shortcut = None
        if in_channels != channels or stride != 1:
            self.shortcut = nn.Sequential(_convolution(in_channels, channels, 1, stride), norm(channels))

    def forward(self, x):
        y = functional.relu_(self.norm1(self.conv1(x)))
        y = functional.relu_(self.norm2(self.conv2(y)))
        return _sum_relu(self.norm3(self.conv3(y)), x if self.shortcut is None else self.shortcut(x))


class CifarBlock(nn.Module):
    """PostActivationBlock of gn_gluon.models.cifar_resnet, with its shortcut of every other pixel and of zeros."""

    def __init__(self, norm, in_channels, channels, stride):
        super().__init__()
        self.conv1, self.norm1 = _convolution(in_channels, channels, 3, stride), norm(channels)
        self.conv2, self.norm2 = _convolution(channels, channels, 3), norm(channels)
        nn.init.zeros_(self.norm2.weight)
        self.stride, self.zeros = stride, channels - in_channels

    def forward(self, x):
        y = self.norm2(self.conv2(functional.relu_(self.norm1(self.conv1(x)))))
        if self.stride > 1 or self.zeros:
            x = functional.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, 0, self.zeros))
        return _sum_relu(y, x)


def _sum_relu(y, residual):
    y += residual
    return functional.relu_(y)


def _convolution(in_channels, channels, kernel, stride=1):
    convolution = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode='fan_out', nonlinearity='relu')
    return convolution


def make_network(case, norm):
    """That of gn_gluon.models, its parameters in the same order. `norm`: function of the number of channels."""
    if case['network'] == 'resnet50':
        block, first, stages = Bottleneck, 64, ((3, 256), (4, 512), (6, 1024), (3, 2048))
        layers = [_convolution(3, first, 7, 2), norm(first), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    else:
        block, first, stages = CifarBlock, 16, ((3, 16), (3, 32), (3, 64))
        layers = [_convolution(3, first, 3), norm(first), nn.ReLU(inplace=True)]
    in_channels = first
    for stage, (blocks, channels) in enumerate(stages):
        for index in range(blocks):
            layers.append(block(norm, in_channels, channels, 2 if stage > 0 and index == 0 else 1))
            in_channels = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, case['num_classes']))


def build(case):
    """The steps of a case, {name: function}; a network has the one, '', and layers one each."""
    torch.manual_seed(0)
    torch.set_num_threads(case['threads'])
    contestant = case['contestant']
    norm = functools.partial(nn.GroupNorm, case['num_groups']) if contestant['norm'] == 'gn' else nn.BatchNorm2d
    layout = getattr(torch, contestant['layout'])
    if case['what'] == 'layer':
        return {layer['name']: _layer_step(case, norm, layer, layout) for layer in case['layers']}
    net = make_network(case, norm).to(memory_format=layout)
    images = torch.randn(case['batch'], 3, case['image_size'], case['image_size']).to(memory_format=layout)
    return {'': (_inference_step if case['what'] == 'inference' else _training_step)(case, net, images)}


def _precision(case):
    if case['contestant']['dtype'] == 'bfloat16':
        return torch.autocast('cpu', torch.bfloat16)
    return contextlib.nullcontext()


def _training_step(case, net, images):
    labels = torch.randint(case['num_classes'], (case['batch'],))
    optimizer = torch.optim.SGD(net.parameters(), case['learning_rate'], momentum=0.9, weight_decay=1e-4, nesterov=True)

    def step():
        start = time.perf_counter()
        optimizer.zero_grad()
        with _precision(case):
            loss = functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        total = loss.item()
        seconds = time.perf_counter() - start
        if not math.isfinite(total):
            raise ArithmeticError(f'the training loss is {total}')
        return seconds
    return step


def _inference_step(case, net, images):
    net.eval()

    def step():
        start = time.perf_counter()
        with torch.inference_mode(), _precision(case):
            net(images)
        return time.perf_counter() - start
    return step


def _layer_step(case, norm, layer, layout):
    shape = (case['batch'], layer['channels'], layer['size'], layer['size'])
    dtype = getattr(torch, case['contestant']['dtype'])

    def random():
        return torch.randn(shape).to(dtype, memory_format=layout)

    inputs = [random().requires_grad_() for _ in range(2 if layer['residual'] else 1)]
    gradient = random()
    block = norm(layer['channels'])
    wanted = inputs + list(block.parameters())

    def step():
        start = time.perf_counter()
        with _precision(case):
            y = block(inputs[0])
            if layer['residual']:
                y += inputs[1]
            if layer['relu']:
                y = functional.relu_(y)
        torch.autograd.grad(y, wanted, gradient)
        return time.perf_counter() - start
    return step
