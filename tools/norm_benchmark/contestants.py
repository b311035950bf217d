"""Who is compared with whom, and on what."""
import collections
import functools

import gn_gluon  # noqa: F401 - first: it makes MXNet importable

# isort: split
import mxnet as mx
from mxnet.gluon import HybridBlock

from gn_gluon.models import CifarResNet, ResNet

#: name: of --only and of the tables; norm: 'bn', 'bn-relu' or 'gn'; operator: what GN_GLUON_OPERATOR asks for, None for
#: a norm of MXNet's or PyTorch's own; dtype: of the activations; layout: PyTorch's memory format.
Contestant = collections.namedtuple('Contestant', 'name framework norm operator dtype layout')


def _ours(operator):
    return [Contestant(operator, 'mxnet', 'gn', operator, 'float32', None),
            Contestant(f'{operator}-bfloat16', 'mxnet', 'gn', operator, 'bfloat16', None)]


def _torch(norm, dtype):
    name = f'torch-{norm}' + ('' if dtype == 'float32' else f'-{dtype}')
    return [Contestant(name, 'torch', norm, None, dtype, 'contiguous_format'),
            Contestant(f'{name}-channels_last', 'torch', norm, None, dtype, 'channels_last')]


# In the order of their start. The first that is there is the reference, which stays when not all fit into memory at
# once; those that are compared directly follow at its side, and the largest come last.
CONTESTANTS = [
    Contestant('mxnet-bn', 'mxnet', 'bn', None, 'float32', None),
    *_ours('native'),
    *_torch('gn', 'float32'),
    *_torch('gn', 'bfloat16'),
    *_torch('bn', 'bfloat16')[::-1],
    Contestant('mxnet-bn-relu', 'mxnet', 'bn-relu', None, 'float32', None),
    *_ours('extension'),
    *_torch('bn', 'float32'),
    Contestant('mxnet-gn', 'mxnet', 'gn', None, 'float32', None),
    *_ours('composed'),
]

#: What is divided by what: the contestant, and those of which the fastest (or smallest) is the divisor.
COMPARISONS = [
    ('native', ('mxnet-bn',)),
    ('native-bfloat16', ('mxnet-bn',)),
    ('extension', ('mxnet-bn',)),
    ('composed', ('mxnet-bn',)),
    ('native', ('mxnet-gn',)),
    ('native', ('torch-gn', 'torch-gn-channels_last')),
    ('native-bfloat16', ('torch-gn-bfloat16', 'torch-gn-bfloat16-channels_last')),
    ('native-bfloat16', ('torch-bn-bfloat16-channels_last',)),
]

#: num_groups: 32 is the paper's; 16 channels, as CIFAR's first stage has, take 8.
Network = collections.namedtuple('Network', 'model num_groups image_size num_classes')
NETWORKS = {'resnet50': Network(ResNet, 32, 224, 1000), 'cifar_resnet20': Network(CifarResNet, 8, 32, 10)}

#: So small that the loss stays where it is: random labels are not to be learnt by heart.
LEARNING_RATE = 1e-4

WHAT = ('layer', 'step', 'inference', 'memory')

#: Batch sizes where --batch names none.
BATCHES = {
    ('layer', 'resnet50'): (8,), ('layer', 'cifar_resnet20'): (128,),
    ('step', 'resnet50'): (8, 2), ('step', 'cifar_resnet20'): (128, 2),
    ('inference', 'resnet50'): (1, 8), ('inference', 'cifar_resnet20'): (1, 128),
    ('memory', 'resnet50'): (8,), ('memory', 'cifar_resnet20'): (128,),
}


def make_case(what, network, batch, threads):
    """What a worker has to know besides its contestant, as JSON can hold it."""
    about = NETWORKS[network]
    return {'what': what, 'network': network, 'batch': batch, 'threads': threads, 'num_groups': about.num_groups,
            'image_size': about.image_size, 'num_classes': about.num_classes, 'learning_rate': LEARNING_RATE,
            'layers': norm_layers(network) if what == 'layer' else []}


class _Recorder(HybridBlock):
    """A norm that does nothing but note its inputs."""

    def __init__(self, seen, in_channels, activation=None, gamma_initializer='ones', prefix=None, params=None):
        super().__init__(prefix=prefix, params=params)
        self._seen = seen
        self._activation = activation

    def hybrid_forward(self, F, x, residual=None):
        self._seen[x.shape[1], x.shape[2], residual is not None, self._activation == 'relu'] += 1
        return x


def norm_layers(network):
    """The norms of a network, equal ones together: a list of dicts, with `count` of them."""
    about = NETWORKS[network]
    seen = collections.Counter()
    net = about.model(functools.partial(_Recorder, seen))
    net.initialize()
    net(mx.nd.zeros((1, 3, about.image_size, about.image_size))).wait_to_read()
    return [{'name': f"{channels}x{size}x{size}{' +residual' * residual}{' +relu' * relu}", 'channels': channels,
             'size': size, 'residual': residual, 'relu': relu, 'count': count}
            for (channels, size, residual, relu), count in seen.items()]
