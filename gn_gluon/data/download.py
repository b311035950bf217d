"""Fetches the official files of the data sets: resumed when cut, checked, and placed only when complete."""
import collections
import contextlib
import hashlib
import os
import re
import shutil
import signal
import stat
import sys
import tarfile
import time
import zipfile

import requests
import urllib3
from tqdm import tqdm

from gn_gluon.errors import Interrupted, UserError

#: name: in the folder; addresses: tried in turn; size: bytes; checksum: 'sha256:...' or 'md5:...'; unpacks_to: the
#: folder inside an archive, which is then unpacked and not kept, or None; unpacked_size: bytes on disk.
RemoteFile = collections.namedtuple(
    'RemoteFile', 'name addresses size checksum unpacks_to unpacked_size', defaults=(None, 0))

#: folder: below --out, where the reader of the data set looks; files: of RemoteFile.
Source = collections.namedtuple('Source', 'folder files')


def _idx_files(bases, sizes_and_checksums):
    names = ('train-images-idx3-ubyte.gz', 'train-labels-idx1-ubyte.gz',
             't10k-images-idx3-ubyte.gz', 't10k-labels-idx1-ubyte.gz')
    return [RemoteFile(name, [base + name for base in bases], size, 'sha256:' + checksum)
            for name, (size, checksum) in zip(names, sizes_and_checksums)]


def _svhn_file(name, size, checksum):
    # No mirror of these files is known: the same host a second time, where http is blocked.
    return RemoteFile(name, [f'{scheme}://ufldl.stanford.edu/housenumbers/{name}' for scheme in ('http', 'https')],
                      size, 'sha256:' + checksum)


# SHA-256 of MNIST, Fashion-MNIST and SVHN: as TensorFlow Datasets publishes them (url_checksums), of CIFAR-10 as
# Keras does. They agree with the MD5 that the authors of Fashion-MNIST, and torchvision for the others, publish.
# Nobody publishes more than the MD5 of Tiny ImageNet.
SOURCES = {
    'MNIST': Source('mnist', _idx_files(
        ['http://yann.lecun.com/exdb/mnist/', 'https://ossci-datasets.s3.amazonaws.com/mnist/',
         'https://storage.googleapis.com/cvdf-datasets/mnist/'],
        [(9912422, '440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609'),
         (28881, '3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c'),
         (1648877, '8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6'),
         (4542, 'f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6')])),
    'Fashion': Source('fashion', _idx_files(
        ['http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/',
         'https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/'],
        [(26421880, '3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84'),
         (29515, 'a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845'),
         (4422102, '346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073'),
         (5148, '67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5')])),
    'SVHN': Source('svhn', [
        _svhn_file('train_32x32.mat', 182040794,
                   '435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8'),
        _svhn_file('test_32x32.mat', 64275384,
                   'cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b')]),
    'SVHNExtra': Source('svhn', [
        _svhn_file('extra_32x32.mat', 1329278602,
                   'a133a4beb38a00fcdda90c9489e0c04f900b660ce8a316a5e854838379a71eb3')]),
    'CIFAR10': Source('cifar10', [RemoteFile(
        'cifar-10-python.tar.gz',
        ['https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz',
         'https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz'],
        170498071, 'sha256:6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce',
        'cifar-10-batches-py', 190 * 10 ** 6)]),
    'TinyImageNet': Source('tiny_imagenet', [RemoteFile(
        'tiny-imagenet-200.zip',
        ['http://cs231n.stanford.edu/tiny-imagenet-200.zip', 'https://image-net.org/data/tiny-imagenet-200.zip'],
        248100043, 'md5:90528d7ca1a48142e341f4ef8d21d0de',
        'tiny-imagenet-200', 550 * 10 ** 6)]),
}
#: What the data set is called in gin files, where that differs.
OTHER_NAMES = {'FashionMNIST': 'Fashion'}

CHUNK = 1 << 16  # bytes
TIMEOUT = 30  # seconds to connect, and without a byte
RETRIES = 3  # at one address, without a byte gained
BACKOFF = 1.0  # seconds before the first retry, doubled before each further one
MANIFEST = 'SHA256SUMS'  # in the unpacked folder, in the format of `sha256sum -c`


class _UnusableError(Exception):
    """This address will not do: the message says why."""


class _CutError(Exception):
    """The connection ended too early: worth another try."""


def download(names, out='datasets'):
    """Fetch the data sets `names` into the folders below `out` where their readers look.

    Files that are there with the right checksum are left alone; partial ones (`.part`) are resumed, also those of an
    earlier run. A data set that fails does not keep the others from being tried.

    Raises UserError for an unknown name, for files that no address delivers intact, and when the disk is full or
    cannot be written; Interrupted after Ctrl-C, with the partial file kept.
    """
    known = {name.lower(): name for name in SOURCES}
    known.update((alias.lower(), name) for alias, name in OTHER_NAMES.items())
    for name in names:
        if name.lower() not in known:
            raise UserError(f'{name!r} is not a data set that can be fetched; there are {", ".join(SOURCES)}')
    failures = []
    try:
        for name in dict.fromkeys(known[name.lower()] for name in names):
            try:
                folder = os.path.join(out, SOURCES[name].folder)
                with _disk_errors(folder):
                    os.makedirs(folder, exist_ok=True)
                for file in SOURCES[name].files:
                    print(f'{name}: {fetch(file, folder)}', flush=True)
            except UserError as error:
                failures.append(str(error))
    except KeyboardInterrupt:
        print('interrupted; what has arrived is kept, and the same command goes on from there', file=sys.stderr)
        raise Interrupted(signal.SIGINT) from None
    if failures:
        raise UserError('; '.join(failures))


def fetch(file, folder):
    """Place one RemoteFile, or what it unpacks to, in `folder`; returns a line that says what was done."""
    target = os.path.join(folder, file.unpacks_to or file.name)
    part = os.path.join(folder, file.name + '.part')
    with _disk_errors(folder):
        if file.unpacks_to and os.path.isdir(target):
            if not os.path.isfile(os.path.join(target, MANIFEST)):
                return f'{target}, which something else put there, is left as it is; move it away to have it fetched'
            fault = _manifest_fault(target)
            if fault is None:
                return f'{target} is already there'
            print(f'{target}: {fault}; fetching it again', flush=True)
        archive = os.path.join(folder, file.name)
        if os.path.isfile(archive):
            if not _is_intact(archive, file):
                print(f'{archive} is damaged; fetching it again', flush=True)
            elif not file.unpacks_to:
                return f'{target} is already there'
            else:
                _unpack(archive, target)  # placed by hand: kept
                return f'{target} unpacked'
        _require_space(file, folder, part)
        _obtain(file, part)
        if file.unpacks_to:
            _unpack(part, target)
            os.remove(part)
        else:
            os.replace(part, target)
    return f'{target} fetched'


@contextlib.contextmanager
def _disk_errors(folder):
    """Turns what the disk says (full, read-only, not a folder...) into a UserError."""
    try:
        yield
    except OSError as error:  # the network's errors never get here: _receive translates them
        raise UserError(f'{error.filename or folder}: {error.strerror or error}; free some space, or give another '
                        'folder with --out') from None


def _require_space(file, folder, part):
    needed = file.size - _size(part) + file.unpacked_size
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f'{folder} has {free / 1e6:.0f} MB free, but {file.name} needs {needed / 1e6:.0f} MB; free '
                        'some space or give another folder with --out')


def _size(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


def _is_intact(path, file):
    """Whether `path` has the size and the checksum of `file`."""
    method, _, expected = file.checksum.partition(':')
    return _size(path) == file.size and _digest(path, method) == expected


def _digest(path, method):
    digest = hashlib.new(method)
    with open(path, 'rb') as opened:
        for chunk in iter(lambda: opened.read(CHUNK), b''):
            digest.update(chunk)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------ from the network

def _obtain(file, part):
    """Complete `part` from the first address that delivers it intact."""
    problems = []
    bar = tqdm(total=file.size, unit='B', unit_scale=True, desc=file.name, disable=None)  # only on a terminal
    with bar:
        for address in file.addresses:
            try:
                return _obtain_from(address, file, part, bar)
            except _UnusableError as problem:
                problems.append(f'{address}: {problem}')
    kept = f' ({_size(part) / 1e6:.1f} of {file.size / 1e6:.1f} MB are kept)' if _size(part) else ''
    raise UserError(f'{file.name} could not be fetched: {"; ".join(problems)}; try the same command later{kept}')


def _obtain_from(address, file, part, bar):
    if bar.disable:
        print(f'{file.name}: {file.size / 1e6:.1f} MB from {address}', flush=True)
    for _ in range(2):  # what is wrong may be the beginning, which an earlier run or another address left
        _complete(address, file, part, bar)
        if _is_intact(part, file):
            return
        os.remove(part)
    raise _UnusableError(f'wrong {file.checksum.partition(":")[0].upper()} checksum, twice')


def _complete(address, file, part, bar):
    """Append to `part` until it has the size of `file`, over as many connections as it takes."""
    furthest, failures = _size(part), 0
    while _size(part) < file.size:
        try:
            _receive(address, file, part, bar)
        except _CutError as problem:
            gained = _size(part) > furthest
            furthest = max(furthest, _size(part))
            failures = 1 if gained else failures + 1
            if failures > RETRIES:
                raise _UnusableError(problem) from None
            time.sleep(BACKOFF * 2 ** (failures - 1))


def _receive(address, file, part, bar):
    """One connection: what `part` lacks, or all of it if the server cannot begin in the middle."""
    start = _size(part)
    # identity: some servers would mark a .gz file as a compressed text, to be unpacked on arrival
    headers = {'Accept-Encoding': 'identity'}
    if start:
        headers['Range'] = f'bytes={start}-'
    with _network_errors():
        response = requests.get(address, headers=headers, stream=True, timeout=TIMEOUT)
    with response:
        start = _first_byte(response, file, start)
        bar.n = start
        bar.refresh()
        chunks = response.raw.stream(CHUNK, decode_content=False)
        with open(part, 'ab' if start else 'wb') as opened:
            while True:
                with _network_errors():
                    chunk = next(chunks, b'')
                if not chunk:
                    break
                if opened.tell() + len(chunk) > file.size:
                    raise _UnusableError(f'sends more than the {file.size} bytes of the official file')
                opened.write(chunk)
                bar.update(len(chunk))
    if _size(part) < file.size:
        raise _CutError('the connection was cut')


def _first_byte(response, file, start):
    """The offset from which the server sends. Raises _CutError if another try may help, _UnusableError if not."""
    status = response.status_code
    if status == 416:  # nothing lies beyond `start`: the file there is another one
        raise _UnusableError('the file there is shorter')
    if status in (408, 429) or status >= 500:
        raise _CutError(f'HTTP {status}')
    if status == 206:
        match = re.match(r'bytes (\d+)-\d+/(\d+|\*)', response.headers.get('Content-Range', ''))
        if not match or int(match.group(1)) != start:
            raise _UnusableError('answers with another part of the file than was asked for')
        total = match.group(2)
    elif status == 200:
        start, total = 0, response.headers.get('Content-Length', '*')
    else:
        raise _UnusableError(f'HTTP {status}')
    if total != '*' and int(total) != file.size:
        raise _UnusableError(f'has {total} bytes, the official file {file.size}')
    return start


@contextlib.contextmanager
def _network_errors():
    try:
        yield
    except (requests.Timeout, urllib3.exceptions.TimeoutError):
        raise _CutError(f'no answer within {TIMEOUT} s') from None
    except (requests.exceptions.SSLError, urllib3.exceptions.SSLError):
        raise _UnusableError('its certificate is not valid') from None
    except requests.exceptions.ConnectionError:
        raise _CutError('no connection') from None
    except urllib3.exceptions.HTTPError:
        raise _CutError('the connection was cut') from None
    except requests.RequestException as error:
        raise _UnusableError(' '.join(str(error).split())) from None


# ----------------------------------------------------------------------------------------------- archives

def _unpack(archive, target):
    """Unpack the folder `target` out of `archive`, beside its place, and rename it when it is complete."""
    print(f'unpacking {archive}', flush=True)
    folder, top = os.path.split(target)
    temporary = os.path.join(folder, top + '.unpacking')
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        sums = []
        for name, source in _members(archive):
            sums.append((_write_member(os.path.join(temporary, *name.split('/')), source), name))
        unpacked = os.path.join(temporary, top)
        if not os.path.isdir(unpacked):
            raise UserError(f'{archive} holds no folder {top}; remove it and try again')
        with open(os.path.join(unpacked, MANIFEST), 'w', encoding='utf-8') as file:
            file.writelines(f'{digest}  {name[len(top) + 1:]}\n' for digest, name in sums
                            if name.startswith(top + '/'))
        if os.path.isdir(target):
            os.rename(target, os.path.join(temporary, 'damaged'))
        os.rename(unpacked, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _members(archive):
    """(name, open file) of each file in a tar or zip archive. Raises UserError for anything but plain files below."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                for member in opened.infolist():
                    kind = stat.S_IFMT(member.external_attr >> 16)
                    if not member.is_dir() or kind not in (0, stat.S_IFDIR):
                        _check_member(archive, member.filename, kind in (0, stat.S_IFREG))
                        with opened.open(member) as source:
                            yield member.filename, source
        else:
            with tarfile.open(archive) as opened:
                for member in opened:
                    if not member.isdir():
                        _check_member(archive, member.name, member.isreg())
                        with opened.extractfile(member) as source:
                            yield member.name, source
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f'{archive} cannot be unpacked: {error}; remove it and try again') from None


def _check_member(archive, name, is_plain):
    if not is_plain or name.startswith('/') or '\\' in name or {'', '.', '..'} & set(name.split('/')):
        raise UserError(f'{archive} is not unpacked: its member {name!r} is not a plain file below its folder')


def _write_member(path, source):
    """Write an open archive member to `path`; returns its SHA-256."""
    digest = hashlib.sha256()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'xb') as file:  # x: no member may replace another
        for chunk in iter(lambda: source.read(CHUNK), b''):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def _manifest_fault(folder):
    """What differs from the manifest in `folder`, in words, or None."""
    with open(os.path.join(folder, MANIFEST), encoding='utf-8') as file:
        for line in file:
            expected, _, name = line.rstrip('\n').partition('  ')
            path = os.path.join(folder, *name.split('/'))
            if not os.path.isfile(path):
                return f'{name} is missing'
            if _digest(path, 'sha256') != expected:
                return f'{name} is damaged'
    return None
