"""Everything a resume needs, saved so that a kill at any instant leaves the last complete checkpoint usable."""
import contextlib
import hashlib
import json
import os
import shutil
import signal
import time

import mxnet as mx

from gn_gluon.errors import Interrupted, NaNLossError, UserError

PARAMETERS, STATES, STATE = 'net.params', 'trainer.states', 'state.json'


class Checkpoints:
    """The checkpoints `last` and `best` of a run folder.

    Each is a folder with the weights (`net.params`, as Block.load_parameters reads them), the optimizer's state
    (`trainer.states`) and `state.json`, which holds the position in the training and the checksums of the other two.

    Arguments:
        folder: the run folder.
        minutes: within an epoch, save every so many minutes; at the end of an epoch it is saved in any case.
    """

    def __init__(self, folder, minutes=10):
        if not minutes > 0:
            raise UserError(f'checkpoint.minutes = {minutes} must be above 0')
        self.folder = folder
        self.seconds = 60 * minutes
        self.saved_at = time.monotonic()

    def due(self):
        """Whether `minutes` have passed since the last save."""
        return time.monotonic() - self.saved_at >= self.seconds

    def save(self, parameters, updater, position, best):
        """Save as `last`, and as `best` too if asked.

        Arguments:
            parameters: dict from name to initialized Parameter.
            updater: optim.Updater.
            position: dict that JSON can hold, saved with the rest.
            best: bool.
        Raises NaNLossError, before anything is written, when a weight is not finite; UserError when it cannot be
        written. In both cases the earlier checkpoint stays as it is.
        """
        arrays = {name: parameter.list_data()[0] for name, parameter in parameters.items()}
        if not mx.nd.multi_all_finite(*arrays.values(), num_arrays=len(arrays)).asscalar():
            raise NaNLossError(f'the weights are not finite; the last good checkpoint in {self.folder} is kept')
        states, scalars = updater.state_dict()
        with _writing(self.folder):
            new = os.path.join(self.folder, '.last.new')
            _make_empty(new)
            files = {name: _save_arrays(os.path.join(new, name), content)
                     for name, content in ((PARAMETERS, arrays), (STATES, states))}
            _write(os.path.join(new, STATE), json.dumps(dict(position, files=files, optimizer=scalars), indent=1))
            _replace_folder(new, os.path.join(self.folder, 'last'))
            if best:
                new = os.path.join(self.folder, '.best.new')
                shutil.rmtree(new, ignore_errors=True)
                shutil.copytree(os.path.join(self.folder, 'last'), new)
                _replace_folder(new, os.path.join(self.folder, 'best'))
        self.saved_at = time.monotonic()

    def exists(self, name='last'):
        """Whether there is such a checkpoint."""
        _recover(os.path.join(self.folder, name))
        return os.path.isdir(os.path.join(self.folder, name))

    def load_state(self, name='last'):
        """Check the files of a checkpoint and return its `state.json`. Raises UserError when one is missing or cut."""
        folder = os.path.join(self.folder, name)
        _recover(folder)
        hint = f'use another checkpoint, or delete {folder} to start again'
        try:
            with open(os.path.join(folder, STATE)) as file:
                state = json.load(file)
            for file_name, expected in state['files'].items():
                found = _fingerprint(os.path.join(folder, file_name))
                if found != expected:
                    raise UserError(
                        f"{os.path.join(folder, file_name)} is damaged: {found['bytes']} bytes with SHA-256 "
                        f"{found['sha256'][:12]}..., expected {expected['bytes']} bytes with "
                        f"{expected['sha256'][:12]}...; {hint}")
        except FileNotFoundError as error:
            raise UserError(f'{error.filename} is missing; {hint}') from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f'{os.path.join(folder, STATE)} is cut or is not a checkpoint; {hint}') from None
        return state

    def load(self, name, parameters, updater=None):
        """Take up a checkpoint: the weights, and for training the optimizer's state. Returns its `state.json`."""
        state = self.load_state(name)
        load_parameters(os.path.join(self.folder, name, PARAMETERS), parameters)
        if updater is not None:
            updater.load_state_dict(_load_arrays(os.path.join(self.folder, name, STATES)), state['optimizer'])
        return state


def load_parameters(path, parameters, replace_classifier=False):
    """Set `parameters` (dict from name to initialized Parameter) to the arrays in `path`.

    With `replace_classifier` the classifier (names that begin with 'output.') may have another number of classes in
    the file: it then keeps its initial values. Returns the names that were kept. Raises UserError, and changes nothing,
    when the file cannot be read or is of another model.
    """
    arrays = _load_arrays(path)
    # Files by Module or by an exported symbol prefix the names.
    arrays = {name.split(':', 1)[-1]: array for name, array in arrays.items()}
    missing = sorted(set(parameters) - set(arrays))
    extra = sorted(set(arrays) - set(parameters))
    if missing or extra:
        raise UserError('{} is of another model: {} parameters are missing ({}), {} are unknown ({})'.format(
            path, len(missing), missing[0] if missing else 'none', len(extra), extra[0] if extra else 'none'))
    differing = [name for name in parameters if parameters[name].shape != arrays[name].shape]
    kept = [name for name in differing if replace_classifier and name.startswith('output.')]
    for name in differing:
        if name not in kept:
            raise UserError(f'{path} is of another model: {name} has shape {arrays[name].shape}, the network expects '
                            f'{parameters[name].shape}')
    for name, parameter in parameters.items():
        if name not in kept:
            parameter.set_data(arrays[name])
    return kept


@contextlib.contextmanager
def signals_as_interrupts():
    """SIGTERM and Ctrl-C become a question: yields `check()`, which raises Interrupted once a signal has come.

    A second signal ends the process at once.
    """
    received = []

    def note(signum, frame):
        if received:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        received.append(signum)

    def check():
        if received:
            raise Interrupted(received[0])

    previous = {signum: signal.signal(signum, note) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield check
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def write_text(path, text):
    """Write a text file so that either the old or the new content is there. Raises UserError when it cannot."""
    with _writing(path):
        _write(path + '.new', text)
        os.replace(path + '.new', path)


@contextlib.contextmanager
def _writing(path):
    try:
        yield
    except (OSError, shutil.Error) as error:
        raise UserError('cannot write {}: {}; what was saved before is untouched'.format(
            path, getattr(error, 'strerror', None) or error)) from None


def _write(path, text):
    with open(path, 'w') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _save_arrays(path, arrays):
    """Write arrays by name, read them back, and return the file's size and checksum."""
    try:
        mx.nd.save(path, arrays)
        # MXNet does not notice a disk that fills up while its buffer is flushed.
        complete = mx.nd.load(path).keys() == arrays.keys() if arrays else True
    except mx.MXNetError:
        complete = False
    if not complete:
        free = shutil.disk_usage(os.path.dirname(path)).free
        raise OSError(f'{path} could not be written whole ({free // 2**20} MB free on the disk)')
    with open(path, 'rb') as file:
        os.fsync(file.fileno())
    return _fingerprint(path)


def _load_arrays(path):
    try:
        arrays = mx.nd.load(path)
    except (mx.MXNetError, OSError):
        if not os.path.isfile(path):
            raise UserError(f'{path} not found') from None
        raise UserError(f'{path} is cut or is not a file of MXNet arrays') from None
    return arrays if isinstance(arrays, dict) else {}


def _fingerprint(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return {'bytes': os.path.getsize(path), 'sha256': digest.hexdigest()}


def _make_empty(folder):
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)


def _replace_folder(new, final):
    """Put the complete folder `new` in the place of `final`. A kill between the renames is mended by `_recover`."""
    old = _old(final)
    shutil.rmtree(old, ignore_errors=True)
    if os.path.isdir(final):
        os.rename(final, old)
    os.rename(new, final)
    shutil.rmtree(old, ignore_errors=True)


def _recover(final):
    # `final` is moved away only when its successor is complete, and back only when that is gone.
    if not os.path.isdir(final) and os.path.isdir(_old(final)):
        folder, name = os.path.split(final)
        new = os.path.join(folder, f'.{name}.new')
        os.rename(new if os.path.isdir(new) else _old(final), final)


def _old(final):
    folder, name = os.path.split(final)
    return os.path.join(folder, f'.{name}.old')
