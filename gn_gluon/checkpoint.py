"""Everything a resume needs, saved so that a kill at any instant leaves the last complete checkpoint usable."""
import contextlib
import hashlib
import json
import os
import re
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
        check_finite(parameters, updater, self.folder)
        arrays = {name: parameter.list_data()[0] for name, parameter in parameters.items()}
        states, scalars = updater.state_dict()
        with _writing(self.folder):
            new_last, new_best = (os.path.join(self.folder, name) for name in ('.last.new', '.best.new'))
            _make_empty(new_last)
            files = {name: _save_arrays(os.path.join(new_last, name), content)
                     for name, content in ((PARAMETERS, arrays), (STATES, states))}
            _write(os.path.join(new_last, STATE), json.dumps(dict(position, files=files, optimizer=scalars), indent=1))
            if best:
                # First: a run that is killed in between repeats the epoch from `last`, and makes the same `best`.
                shutil.rmtree(new_best, ignore_errors=True)
                shutil.copytree(new_last, new_best)
                _replace_folder(new_best, os.path.join(self.folder, 'best'))
            _replace_folder(new_last, os.path.join(self.folder, 'last'))
        self.saved_at = time.monotonic()

    def recover(self):
        """Finish what a kill between two renames left undone. For the process that trains in the folder."""
        for name in ('last', 'best'):
            final = os.path.join(self.folder, name)
            if _readable(final) != final:
                os.rename(_readable(final), final)

    def exists(self, name='last'):
        """Whether there is such a checkpoint."""
        return os.path.isdir(_readable(os.path.join(self.folder, name)))

    def load(self, name, parameters, updater=None):
        """Take up a checkpoint: the weights, and for training the optimizer's state. Returns its `state.json`.

        Raises UserError when a file is missing or damaged, or is of another model.
        """
        for attempt in range(3):
            # A run that is training replaces its checkpoints: what looks damaged may be whole a moment later.
            folder = _readable(os.path.join(self.folder, name))
            try:
                state = _checked_state(folder)
                break
            except UserError:
                if attempt == 2:
                    raise
                time.sleep(0.3)
        load_parameters(os.path.join(folder, PARAMETERS), parameters)
        if updater is not None:
            updater.load_state_dict(_load_arrays(os.path.join(folder, STATES)), state['optimizer'])
        return state


def check_finite(parameters, updater, folder):
    """Raise NaNLossError when a weight or an optimizer state is not finite: such a run is not worth keeping."""
    arrays = [parameter.list_data()[0] for parameter in parameters.values()] + list(updater.state_dict()[0].values())
    # The operator writes beyond its own list of 200 arrays.
    parts = (arrays[start:start + 200] for start in range(0, len(arrays), 200))
    if not all(mx.nd.multi_all_finite(*part, num_arrays=len(part)).asscalar() for part in parts):
        raise NaNLossError(f'the weights are not finite after update {updater.num_updates}; lower the learning rate or '
                           'clip the gradients (train.gradient_clip_norm); the last good checkpoint, if any, is in '
                           f'{folder}')


def _checked_state(folder):
    hint = f'use another checkpoint, or delete {folder} to start again'
    state = read_json(os.path.join(folder, STATE), hint)
    try:
        for file_name, expected in state['files'].items():
            path = os.path.join(folder, file_name)
            found = _fingerprint(path)
            if found != expected:
                raise UserError(f"{path} is damaged: {found['bytes']} bytes with SHA-256 {found['sha256'][:12]}..., "
                                f"expected {expected['bytes']} bytes with {expected['sha256'][:12]}...; {hint}")
    except FileNotFoundError as error:
        raise UserError(f'{error.filename} is missing; {hint}') from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f'{os.path.join(folder, STATE)} is not the state of a checkpoint; {hint}') from None
    return state


def load_parameters(path, parameters, replace_classifier=False):
    """Set `parameters` (dict from name to initialized Parameter) to the arrays in `path`.

    With `replace_classifier` the classifier (names that begin with 'output.') may have another number of classes in
    the file: it then keeps its initial values. Returns the names that were kept. Raises UserError, and changes nothing,
    when the file cannot be read or is of another model.
    """
    arrays = _load_arrays(path)
    # Files by Module or by an exported symbol prefix the names.
    arrays = {re.sub('^(arg|aux):', '', name): array for name, array in arrays.items()}
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


def read_json(path, hint):
    """The object in a JSON file. Raises UserError with `hint`, what to do, when it is missing or cut."""
    try:
        with open(path) as file:
            return json.load(file)
    except FileNotFoundError:
        raise UserError(f'{path} is missing; {hint}') from None
    except ValueError:
        raise UserError(f'{path} is cut or is not JSON; {hint}') from None


def write_text(path, text):
    """Write a text file so that either the old or the new content is there. Raises UserError when it cannot."""
    with _writing(path):
        _write(path + '.new', text)
        os.replace(path + '.new', path)


def write_bytes(path, content):
    """As `write_text`, of bytes."""
    with _writing(path):
        _write(path + '.new', content)
        os.replace(path + '.new', path)


def write_arrays(path, arrays):
    """As `write_text`, of a dict of NDArrays in MXNet's own format (.params)."""
    with _writing(path):
        _save_arrays(path + '.new', arrays)
        os.replace(path + '.new', path)


@contextlib.contextmanager
def _writing(path):
    try:
        yield
    except (OSError, shutil.Error) as error:
        raise UserError('cannot write {}: {}; what was saved before is untouched'.format(
            path, getattr(error, 'strerror', None) or error)) from None


def _write(path, content):
    with open(path, 'wb' if isinstance(content, bytes) else 'w') as file:
        file.write(content)
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
        if os.path.isdir(path):
            raise UserError(f'{path} is a folder; name the file, as {os.path.join(path, PARAMETERS)}') from None
        if not os.path.exists(path):
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
    """Put the complete folder `new` in the place of `final`. A kill between the renames is seen by `_readable`."""
    old = _old(final)
    shutil.rmtree(old, ignore_errors=True)
    if os.path.isdir(final):
        os.rename(final, old)
    os.rename(new, final)
    shutil.rmtree(old, ignore_errors=True)


def _readable(final):
    """Where the checkpoint `final` is: moved away for a moment, or for good by a kill, its successor is complete."""
    if not os.path.isdir(final) and os.path.isdir(_old(final)):
        folder, name = os.path.split(final)
        new = os.path.join(folder, f'.{name}.new')
        return new if os.path.isdir(new) else _old(final)
    return final


def _old(final):
    folder, name = os.path.split(final)
    return os.path.join(folder, f'.{name}.old')
