"""Reads the arrays of files that PyTorch, Caffe2, NumPy, safetensors and MXNet have written, and runs nothing of them.

PyTorch's two formats (torch.serialization) are read without PyTorch: a zip archive, and the older one, several pickles
with the tensors' memory after them. A pickle may call the functions that make arrays, and no others.
"""
import collections
import os
import pickle
import re
import zipfile

import mxnet as mx
import numpy as np
from numpy.lib.stride_tricks import as_strided
from safetensors.numpy import load_file

from gn_gluon.errors import UserError

_LEGACY_MAGIC = 0x1950a86a20f9469cfc6c
_MXNET_MAGIC = 0x112
#: What a checkpoint keeps its parameters under, beside the epoch and so on.
_WRAPPERS = ('blobs', 'state_dict', 'model')


def read_arrays(path):
    """The arrays in the file `path`: dict from name to NumPy array.

    Raises UserError if it cannot be read or is of no known kind, and for a pickle that wants to call anything but what
    makes arrays: nothing is called then.
    """
    try:
        with open(path, 'rb') as file:
            return _arrays(_content(file))
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror or error}') from None
    except _Refused as error:
        raise UserError(f'{path} wants to call {error} when it is loaded, which makes no array; it was not called: '
                        'give a file that holds arrays only') from None
    except Exception as error:  # damaged bytes may lead to any
        raise UserError(f'{path} is cut, or is no file of arrays by PyTorch, Caffe2, NumPy, safetensors or MXNet '
                        f'({type(error).__name__}); fetch it again') from None


def _content(file):
    """What is in the open file, as a dict."""
    size, head = os.fstat(file.fileno()).st_size, file.read(16)
    number = int.from_bytes(head[:8], 'little')
    file.seek(0)
    if head.startswith(b'PK'):
        return _read_zip(file)
    if number == _MXNET_MAGIC:
        return {name: array.asnumpy() for name, array in mx.nd.load(file.name).items()}
    if head[8:9] == b'{' and number < size:
        return load_file(file.name)
    content = _Unpickler(file).load()
    return _read_legacy(file) if content == _LEGACY_MAGIC else content


def _read_zip(file):
    with zipfile.ZipFile(file) as archive:
        pickled = [name for name in archive.namelist() if name.endswith('/data.pkl')]
        if not pickled:
            # TensorFlow calls a variable's tensor by its name and :0.
            return {re.sub(':0$', '', name): array for name, array in np.load(file, allow_pickle=False).items()}
        folder = os.path.dirname(pickled[0])
        with archive.open(pickled[0]) as stream:
            unpickler = _Unpickler(stream)
            content = unpickler.load()
        for key, storage in unpickler.storages.items():
            storage.memory = archive.read(f'{folder}/data/{key}')
        return content


def _read_legacy(file):
    """What follows the magic number: version, platform, the content itself, and the storages."""
    for _ in range(2):
        _Unpickler(file).load()
    unpickler = _Unpickler(file)
    content = unpickler.load()
    for key in _Unpickler(file).load():
        storage = unpickler.storages[key]
        storage.memory = file.read(8 + storage.number * storage.dtype.itemsize)[8:]  # after their number
    return content


class _Refused(Exception):  # noqa: N818 - the file is well-formed
    """A pickle named something that is not in _CALLED."""


class _Storage:
    """The memory of one or more tensors; it is read after the pickle that refers to it."""

    DTYPES = {name + 'Storage': np.dtype(dtype) for name, dtype in (
        ('Float', '<f4'), ('Half', '<f2'), ('Double', '<f8'), ('BFloat16', '<u2'), ('Byte', 'u1'), ('Char', 'i1'),
        ('Short', '<i2'), ('Int', '<i4'), ('Long', '<i8'), ('Bool', '?'))}

    def __init__(self, kind, number):
        self.kind, self.dtype, self.number, self.memory = kind, self.DTYPES[kind], number, b''

    def array(self):
        array = np.frombuffer(self.memory, self.dtype, self.number)
        if self.kind == 'BFloat16Storage':  # the upper half of a float32
            array = (array.astype('<u4') << 16).view('<f4')
        return array


class _Tensor:
    """A view of a storage, with its strides in elements."""

    def __init__(self, storage, offset, shape, strides, *_):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def array(self):
        memory = self.storage.array()[self.offset:]
        last = sum((number - 1) * stride for number, stride in zip(self.shape, self.strides))
        if min(self.offset, *self.strides, 0) < 0 or all(self.shape) and last >= len(memory):
            raise ValueError('a tensor reaches beyond its storage')
        return as_strided(memory, self.shape, [stride * memory.itemsize for stride in self.strides]).copy()


class _Unpickler(pickle.Unpickler):
    """Calls nothing that is not in _CALLED. `storages` are those that the pickle refers to."""

    def __init__(self, file):
        super().__init__(file, encoding='latin1')  # Python 2's bytes, in NumPy's arrays
        self.storages = {}

    def find_class(self, module, name):
        if module == 'torch' and name in _Storage.DTYPES:
            return name
        if f'{module}.{name}' not in _CALLED:
            raise _Refused(f'{module}.{name}')
        return _CALLED[f'{module}.{name}']

    def persistent_load(self, pid):
        _, kind, key, _, number = pid[:5]
        return self.storages.setdefault(key, _Storage(kind, number))


_multiarray = np.core.multiarray
_CALLED = {
    'collections.OrderedDict': collections.OrderedDict,
    '_codecs.encode': lambda text, encoding: text.encode('latin1'),
    'numpy.dtype': np.dtype,
    'numpy.ndarray': np.ndarray,
    **{f'numpy.{core}.multiarray.{name}': getattr(_multiarray, name)
       for core in ('core', '_core') for name in ('_reconstruct', 'scalar')},
    'torch.Size': tuple,
    'torch._utils._rebuild_tensor': _Tensor,
    'torch._utils._rebuild_tensor_v2': _Tensor,
    'torch._utils._rebuild_parameter': lambda tensor, requires_grad, hooks: tensor}


def _arrays(content):
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    arrays = {name: value.array() if isinstance(value, _Tensor) else value for name, value in content.items()
              if isinstance(value, (_Tensor, np.ndarray))}
    if all(name.startswith('module.') for name in arrays):  # of torch.nn.DataParallel
        arrays = {name[len('module.'):]: array for name, array in arrays.items()}
    return arrays
