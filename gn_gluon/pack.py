"""Packs a data set of JPEG images into RecordIO files, and verifies what was packed."""
import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time

import numpy as np
from tqdm import tqdm

from gn_gluon import compat
from gn_gluon.checkpoint import read_json, write_text
from gn_gluon.data import examine, records
from gn_gluon.data.sources import Source
from gn_gluon.errors import Interrupted, UserError
from gn_gluon.workers import Workers

UNFINISHED = 'unfinished'
STATE = 'state.json'
FILES = [f'{split}.{kind}' for split in records.SPLITS for kind in ('rec', 'idx')] + [records.CLASSES]

#: The list of images of a split: a row each, in the order of packing, and their names one after another.
ROW = np.dtype([('label', '<i4'), ('name_bytes', '<i4'), ('name_start', '<i8'), ('offset', '<i8'), ('size', '<i8')])

SLOT_BYTES = 2 << 20
IMAGES_PER_TASK = 64
SAVE_SECONDS = 10.0
TELL_SECONDS = 30.0  # between lines where there is no terminal for a progress bar
SAMPLE = 1024  # images from which the size of all is estimated where they are reduced; they come in random order
SHOWN = 50  # images named on the terminal; the manifest names all


def pack(src, out, resize=None, quality=None, seed=0, workers=None, check_signals=lambda: None):
    """Pack the images below `src` (see data.sources.Source) into the folder `out` (see data.records).

    It can be interrupted at any instant and goes on when called again; the files are the same byte for byte, with any
    number of workers. They are in `out`/unfinished until all are complete. Each image is decoded once; those that
    cannot be are left out, and named with the others that are not what they seem, here and in the manifest.

    Arguments:
        src, out: folders.
        resize: shorter side in pixels to which larger images are reduced; None keeps all, as the bytes they are.
        quality: of reduced images as JPEG, 1 to 100; default 95.
        seed: of the order of the images in each split, 0 to 2**32 - 1.
        workers: processes; default one for each core.
        check_signals: called often; may raise Interrupted.
    Raises UserError for bad input, a full disk, other settings than those that `out` was begun with; Interrupted.
    """
    settings = _check_settings(resize, quality, seed)
    workers = _check_workers(workers)
    if os.path.exists(os.path.join(out, records.MANIFEST)):
        _already_packed(out, settings)
        return
    source = Source(src)
    if not source.splits['train'].title and os.path.commonpath([os.path.realpath(src), os.path.realpath(out)]) == (
            os.path.realpath(src)):
        raise UserError(f'--out {out} would lie in --src {src}, whose folders are the classes; give another --out')
    work = os.path.join(out, UNFINISHED)
    with _disk_errors(out), _lock(out, work) as lock:
        state = _begin(source, work, settings, check_signals)
        run = _Run(source, out, work, state, check_signals)
        if not os.path.exists(os.path.join(work, records.MANIFEST)):
            with Workers(workers, _Examine(source, work, settings), SLOT_BYTES, inherited=[lock]) as pool:
                for split in records.SPLITS:
                    run.pack_split(split, pool)
        manifest = _publish(out, work, state)
    run.report(manifest, workers)


def verify(folder, workers=None, check_signals=lambda: None):
    """Read a packed data set again, whole, and compare it with its manifest.

    Checksums, counts, labels, and every image is decoded. Prints what was found to be whole. Raises UserError, after a
    line for each fault found, when anything differs.
    """
    workers = _check_workers(workers)
    manifest = records.read_manifest(folder)
    num_classes = len(records.read_classes(folder, manifest))
    faults = []
    if num_classes != manifest['num_classes']:
        faults.append(f'{records.CLASSES} holds {num_classes} classes, not {manifest["num_classes"]}')
    for split in records.SPLITS:
        entry = manifest['splits'][split]
        offsets = records.read_index(folder, split, manifest)
        opened = records.RecordFile(os.path.join(folder, f'{split}.rec'), offsets)
        rec_sha256, counts = hashlib.sha256(), np.zeros(num_classes, np.int64)
        with Workers(workers, _Check(opened, num_classes)) as pool, _Progress(f'verifying {split}', len(opened)) as bar:
            tasks = ((i, min(i + IMAGES_PER_TASK, len(opened))) for i in range(0, len(opened), IMAGES_PER_TASK))
            for (start, stop, labels, found), _ in pool.run(tasks):
                check_signals()
                faults += found
                counts += np.bincount(labels, minlength=num_classes)
                rec_sha256.update(opened.read_bytes(start, stop))
                bar.advance(stop - start)
        if rec_sha256.hexdigest() != entry['rec_sha256']:
            faults.append(f'{split}.rec has not the SHA-256 that was packed')
        idx_sha256 = hashlib.sha256()
        _hash(os.path.join(folder, f'{split}.idx'), idx_sha256, entry['idx_bytes'])
        if idx_sha256.hexdigest() != entry['idx_sha256']:
            faults.append(f'{split}.idx has not the SHA-256 that was packed')
        if counts.tolist() != entry['images_per_class']:
            faults.append(f'{split}.rec has not as many images of each class as were packed')
    if faults:
        for fault in faults[:SHOWN]:
            print(fault, file=sys.stderr)
        raise UserError(f'{folder} is damaged, {len(faults)} faults, the first: {faults[0]}; copy it anew or '
                        'pack it again')
    print(f'{_summary(folder, manifest)}: verified, all is as it was packed and every image decodes')


# ------------------------------------------------------------------------------------------ what was asked for

def _check_settings(resize, quality, seed):
    if quality is not None and resize is None:
        raise UserError(f'--quality {quality} is for reduced images: give --resize too, or neither to keep all images '
                        'as they are')
    if resize is not None and resize < 1:
        raise UserError(f'--resize {resize} must be at least 1, the shorter side in pixels')
    if quality is not None and not 1 <= quality <= 100:
        raise UserError(f'--quality {quality} must be from 1 to 100')
    if not 0 <= seed < 2**32:
        raise UserError(f'--seed {seed} must be from 0 to {2**32 - 1}')
    return {'resize': resize, 'quality': quality or examine.QUALITY if resize else None, 'seed': seed}


def _check_workers(workers):
    if workers is not None and workers < 1:
        raise UserError(f'--workers {workers} must be at least 1')
    return workers or compat.usable_cores()


def _refuse_other_settings(settings, found, where):
    if any(found[name] != value for name, value in settings.items()):
        raise UserError(f'{where} was packed with {_options(found)}, not {_options(settings)}; give these, or another '
                        f'--out, or remove {where}')


def _options(settings):
    given = [f'--{name} {settings[name]}' for name in ('resize', 'quality', 'seed') if settings[name] is not None]
    return ' '.join(given)


def _already_packed(out, settings):
    manifest = records.read_manifest(out)
    _refuse_other_settings(settings, manifest, out)
    shutil.rmtree(os.path.join(out, UNFINISHED), ignore_errors=True)  # after a kill at the very end
    print(f'{_summary(out, manifest)}: packed already, nothing to do')


# ------------------------------------------------------------------------------------------ the unfinished folder

@contextlib.contextmanager
def _disk_errors(out):
    """What the disk says (full, read-only...) as a UserError. Files of the source are read elsewhere."""
    try:
        yield
    except OSError as error:
        raise UserError(f'{error.filename or out} cannot be written ({error.strerror or error}); make room, or give '
                        'another --out, and the same command goes on') from None


@contextlib.contextmanager
def _lock(out, work):
    """Make the folder `work`, and keep a second process out. What has not begun to be packed leaves no trace."""
    others = [name for name in FILES if os.path.exists(os.path.join(out, name))]
    if others and not os.path.exists(os.path.join(work, records.MANIFEST)):
        raise UserError(f'{out} holds {others[0]} but no {records.MANIFEST}, so it is not known what that is; give '
                        'another --out or remove it')
    os.makedirs(work, exist_ok=True)
    with open(os.path.join(work, 'lock'), 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f'another process is packing into {out}; wait for it or give another --out') from None
        try:
            yield lock
        finally:
            if not os.path.exists(os.path.join(work, STATE)):
                shutil.rmtree(work, ignore_errors=True)
                with contextlib.suppress(OSError):  # there was something in it before
                    os.rmdir(out)


def _begin(source, work, settings, check_signals):
    """How far the packing is: the dict that state.json holds, of an earlier run or, with new lists, of none."""
    path = os.path.join(work, STATE)
    stamps = {split: images.stamps() for split, images in source.splits.items()}
    lines = [f'{name}\t{source.words[name]}\n' if source.words.get(name) else f'{name}\n' for name in source.classes]
    if os.path.exists(path):
        hint = f'remove {work} to start again'
        state = read_json(path, hint)
        _refuse_other_settings(settings, state, work)
        if state['stamps'] != stamps or state['lines'] != lines:
            raise UserError(f'the images in {source.folder} are not those, or not as they were, when {work} was begun; '
                            f'give the same --src, or {hint}')
        return state
    empty = hashlib.sha256().hexdigest()
    state = dict(settings, stamps=stamps, lines=lines, counted=dict.fromkeys(examine.COUNTED, 0), splits={},
                 **{kind: [] for kind in examine.NAMED})
    for number, (split, images) in enumerate(source.splits.items()):
        _list(images, work, split, [settings['seed'], number], check_signals)
        state['splits'][split] = {
            'next': 0, 'num_images': 0, 'rec_bytes': 0, 'rec_sha256': empty, 'idx_bytes': 0, 'idx_sha256': empty,
            'images_per_class': [0] * len(source.classes)}
    write_text(path, json.dumps(state))
    return state


def _list(images, work, split, seed, check_signals):
    """Write the list of a split's images, in random order."""
    rows, name_start = [], 0
    with open(_rows_path(work, split), 'wb') as rows_file, open(_names_path(work, split), 'wb') as names, _Progress(
            f'listing {images.title}') as bar:
        for label, name, offset, size in images.listing():
            name = os.fsencode(name)
            names.write(name)
            rows.append((label, len(name), name_start, offset, size))
            name_start += len(name)
            if len(rows) == 1 << 12:
                _append_rows(rows, rows_file, bar)
                check_signals()
        _append_rows(rows, rows_file, bar)
    rows = np.fromfile(_rows_path(work, split), ROW)
    # RandomState, since NumPy changes the streams of its newer generators from time to time.
    rows[np.random.RandomState(seed).permutation(len(rows))].tofile(_rows_path(work, split))
    print(f'{split}: {len(rows):,} images in {images.title}' if len(rows) else f'{split}: no images', flush=True)
    if images.num_passed_over:
        print(f'{split}: {images.num_passed_over:,} other files passed over, which by their names are no images, as '
              f'{images.passed_over}', flush=True)


def _append_rows(rows, file, bar):
    np.array(rows, ROW).tofile(file)
    bar.advance(len(rows))
    rows.clear()


def _rows_path(work, split):
    return os.path.join(work, f'{split}.list')


def _names_path(work, split):
    return os.path.join(work, f'{split}.names')


class _List:
    """The list of a split's images, read row by row as it is asked for."""

    def __init__(self, work, split):
        path = _rows_path(work, split)
        self.rows = np.asarray(np.memmap(path, ROW, 'r')) if os.path.getsize(path) else np.empty(0, ROW)
        self.names = open(_names_path(work, split), 'rb', buffering=0)

    def name(self, row):
        return os.fsdecode(os.pread(self.names.fileno(), int(row['name_bytes']), int(row['name_start'])))


# ------------------------------------------------------------------------------------------ in the worker processes

class _Examine:
    """The work on a task (split, first row, row after the last): read, decode and examine the images of the rows.

    Returns first row, row after the last, a list of (image, notes), and the seconds that decoding took. `image` is None
    for one that is left out, the number of bytes that lie in the slot at the image's place, or, where they do not fit
    there, the bytes.
    """

    def __init__(self, source, work, settings):
        self.source, self.work = source, work
        self.resize, self.quality = settings['resize'], settings['quality'] or examine.QUALITY
        self.opened, self.complaints = {}, None

    def __call__(self, task, slot):
        split, start, stop = task
        if not self.opened:  # the first task in this process
            self.complaints = examine.Complaints()
        if split not in self.opened:
            archive = self.source.splits[split].archive
            self.opened[split] = _List(self.work, split), archive and open(archive, 'rb', buffering=0)
        listed, archive = self.opened[split]
        rows = listed.rows[start:stop]
        outcomes, decoding = [], 0.0
        for row, place in zip(rows, _places(rows)):
            name, size = listed.name(row), int(row['size'])
            room = slot[place:place + size]
            data = room if len(room) == size else memoryview(bytearray(size))
            self._read(split, archive, name, int(row['offset']), data)
            content, notes, seconds = examine.examine(name, data, self.complaints, self.resize, self.quality)
            decoding += seconds
            if content is not None and len(content) <= len(room):
                if content is not data:
                    room[:len(content)] = content
                content = len(content)
            outcomes.append((bytes(content) if content is data else content, notes))
        return start, stop, outcomes, decoding

    def _read(self, split, archive, name, offset, data):
        """Fill `data` with the bytes of one image."""
        try:
            if archive is not None:
                found = os.preadv(archive.fileno(), [data], offset)
            else:
                opened = os.open(os.path.join(self.source.splits[split].folder, name), os.O_RDONLY)
                try:
                    found = os.readv(opened, [data])
                finally:
                    os.close(opened)
        except OSError as error:
            raise UserError(f'{name} in {self.source.folder} cannot be read ({error.strerror}); make it readable, and '
                            'the same command goes on') from None
        if found != len(data):
            raise UserError(f'{name} in {self.source.folder} has {found} bytes, not the {len(data)} it had when it was '
                            'listed; put the images back as they were')


class _Check:
    """The work on a task (first record, record after the last): (*task, labels, faults in words)."""

    def __init__(self, opened, num_classes):
        self.opened, self.num_classes = opened, num_classes
        self.complaints = None

    def __call__(self, task, slot):
        self.complaints = self.complaints or examine.Complaints()
        labels, faults = [], []
        for number in range(*task):
            try:
                label, data, _ = self.opened.read(number)
            except UserError as error:
                faults.append(str(error))
                continue
            image, complaint = examine.decode(data, self.complaints) if len(data) else (None, 'empty')
            if image is None or examine.lost_pixels(complaint):
                faults.append(f'{self.opened.path}: record {number} cannot be decoded {complaint}'.rstrip())
            if not 0 <= label < self.num_classes:
                faults.append(f'{self.opened.path}: record {number} has the label {label}')
            else:
                labels.append(label)
        return (*task, labels, faults)


def _places(rows):
    """Where the images of a task lie in its slot: each at a multiple of four bytes."""
    sizes = -(-rows['size'] // 4) * 4
    return (np.cumsum(sizes) - sizes).tolist()


# ------------------------------------------------------------------------------------------ in the first process

class _Run:
    """The packing of the splits, one after the other, from where `state` is on."""

    def __init__(self, source, out, work, state, check_signals):
        self.source, self.out, self.work, self.state = source, out, work, state
        self.check_signals = check_signals
        self.lists = {split: _List(work, split) for split in records.SPLITS}
        self.num_images, self.seconds, self.decoding = 0, 0.0, 0.0
        self.saved_at = time.monotonic()
        self.space_known = False

    def pack_split(self, split, pool):
        """Append to the .rec and .idx of a split what they lack."""
        listed, progress = self.lists[split], self.state['splits'][split]
        rec, idx = (_Appended(os.path.join(self.work, f'{split}.{kind}'), progress[f'{kind}_bytes'],
                              progress[f'{kind}_sha256']) for kind in ('rec', 'idx'))
        self._check_space(progress)
        began = time.monotonic()
        tasks = ((split, start, stop) for start, stop in self._tasks(listed, progress['next']))
        with rec, idx, concurrent.futures.ThreadPoolExecutor(1) as saver, _Progress(
                f'packing {split}', len(listed.rows), progress['next']) as bar:
            saving = None
            try:
                for result, slot in pool.run(tasks):
                    self.check_signals()
                    self._append(listed, progress, result, slot, rec, idx)
                    bar.advance(progress['next'] - bar.done)
                    self._check_space(progress)
                    if time.monotonic() - self.saved_at >= SAVE_SECONDS and (saving is None or saving.done()):
                        if saving is not None:
                            saving.result()
                        # Elsewhere, since the disk may take seconds over it.
                        saving = saver.submit(self._save, rec, idx, self._snapshot(rec, idx))
            except Interrupted:
                if saving is not None:
                    saving.result()
                self._save(rec, idx, self._snapshot(rec, idx))
                print(f'interrupted; {progress["next"]:,} of {len(listed.rows):,} images of {split} are done, and the '
                      'same command goes on from there', file=sys.stderr)
                raise
            if saving is not None:
                saving.result()
            self._save(rec, idx, self._snapshot(rec, idx))
        self.seconds += time.monotonic() - began
        if split == 'train' and not progress['num_images']:
            raise UserError(f'none of the {len(listed.rows)} training images in {self.source.folder} can be decoded '
                            f'(the first: {self.state[examine.LEFT_OUT][0]["reason"]}); give another --src')

    def _tasks(self, listed, start):
        """(first row, row after the last) of tasks whose images fit into a slot."""
        while start < len(listed.rows):
            rows = listed.rows[start:start + IMAGES_PER_TASK]
            ends = np.add(_places(rows), rows['size'])
            stop = start + max(1, int(np.searchsorted(ends, SLOT_BYTES, 'right')))
            yield start, stop
            start = stop

    def _append(self, listed, progress, result, slot, rec, idx):
        """Write the images of one task, and then say so in the state: it never tells of half a task."""
        start, stop, outcomes, decoding = result
        rows = listed.rows[start:stop]
        number, labels, named, counted = progress['num_images'], [], [], []
        for (content, notes), place, label, row in zip(outcomes, _places(rows), rows['label'].tolist(), rows):
            for kind, text in notes:
                if kind in examine.NAMED:
                    # a name of a file need not be text
                    name = listed.name(row).encode('utf-8', 'backslashreplace').decode()
                    named.append((kind, {'file': name, 'reason': text}))
                else:
                    counted.append(kind)
            if content is None:
                continue
            image = slot[place:place + content] if isinstance(content, int) else content
            idx.write(b'%d\t%d\n' % (number, rec.size))
            rec.write(records.write_record(label, number, image))
            labels.append(label)
            number += 1
        for label in labels:
            progress['images_per_class'][label] += 1
        for kind, entry in named:
            self.state[kind].append(entry)
        for kind in counted:
            self.state['counted'][kind] += 1
        progress.update(next=stop, num_images=number, **rec.state('rec'), **idx.state('idx'))
        self.num_images += stop - start
        self.decoding += decoding

    def _snapshot(self, rec, idx):
        rec.flush()
        idx.flush()
        self.saved_at = time.monotonic()
        return json.dumps(self.state)

    def _save(self, rec, idx, snapshot):
        """Have what the snapshot tells of on the disk, then the snapshot."""
        rec.sync()
        idx.sync()
        write_text(os.path.join(self.work, STATE), snapshot)

    def _check_space(self, progress):
        """Raise UserError if the images left will not fit on the disk: reduced ones when some have shown their size."""
        rows, done = [listed.rows for listed in self.lists.values()], progress['next']
        if self.space_known or self.state['resize'] is not None and done < min(SAMPLE, len(rows[0])):
            return
        if self.state['resize'] is None:
            packed = sum(split['rec_bytes'] for split in self.state['splits'].values())
            needed = sum(int(of_split['size'].sum()) + 64 * len(of_split) for of_split in rows) - packed
        else:
            left = sum(map(len, rows)) - sum(split['next'] for split in self.state['splits'].values())
            needed = int(left * 1.02 * (progress['rec_bytes'] / done + 20))
        free = shutil.disk_usage(self.out).free
        if free < needed:
            raise UserError(f'{self.out} has {free / 1e9:.2f} GB free, but the images to be packed need '
                            f'{needed / 1e9:.2f} GB; make room and the same command goes on, or give another --out, or '
                            'a (smaller) --resize')
        self.space_known = True

    def report(self, manifest, workers):
        """Print what was made of the images, and how fast."""
        for kind, what in ((examine.LEFT_OUT, 'left out'), (examine.CONVERTED, 'encoded anew as RGB JPEG'),
                           (examine.WARNED, 'packed, but the decoder complained')):
            entries = manifest[kind]
            if entries:
                print(f'{what} ({len(entries):,} images):')
                for entry in entries[:SHOWN]:
                    print('  {file}: {reason}'.format(**entry))
                if len(entries) > SHOWN:
                    print(f'  ... all are in {os.path.join(self.out, records.MANIFEST)}')
        print('of the images packed, grayscale: {:,}; with an orientation in EXIF, to be ignored: {:,}; from other '
              'formats than JPEG: {:,}; reduced: {:,}'.format(*(manifest['counted'][kind] for kind in examine.COUNTED)))
        if self.num_images:
            rate = self.num_images / self.seconds
            print(f'{self.num_images:,} images in {self.seconds:.1f} s: {rate:,.0f} images/s with {workers} workers, '
                  f'{rate / workers:,.0f} each; {100 * self.decoding / self.seconds / workers:.0f} % of their time '
                  'in cv2.imdecode')
        left_out = len(manifest[examine.LEFT_OUT])
        print(_summary(self.out, manifest) + (f'; left out, see above: {left_out:,}' if left_out else ''))


class _Appended:
    """A file that grows, with its checksum; what an interrupted run left is checked and cut to what the state tells."""

    def __init__(self, path, size, sha256):
        self.size, self.sha256 = size, hashlib.sha256()
        if size:
            _hash(path, self.sha256, size)
        if self.sha256.hexdigest() != sha256:
            raise UserError(f'{path} does not hold what was written to it; remove {os.path.dirname(path)} to start '
                            'again')
        self.file = open(path, 'ab', buffering=1 << 18)
        self.file.truncate(size)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        self.file.write(data)
        self.sha256.update(data)
        self.size += len(data)

    def flush(self):
        self.file.flush()

    def sync(self):
        os.fsync(self.file.fileno())

    def state(self, kind):
        return {f'{kind}_bytes': self.size, f'{kind}_sha256': self.sha256.hexdigest()}


def _hash(path, sha256, size):
    """Update `sha256` with the first `size` bytes of a file."""
    with open(path, 'rb') as file, _Progress(f'checking {os.path.basename(path)}', size, unit='bytes') as bar:
        while size:
            block = file.read(min(size, 1 << 20))
            if not block:
                break
            sha256.update(block)
            size -= len(block)
            bar.advance(len(block))


def _publish(out, work, state):
    """Move the complete files to `out`, the manifest last. Returns the manifest."""
    path = os.path.join(work, records.MANIFEST)
    if not os.path.exists(path):
        classes = ''.join(state['lines']).encode('utf-8')
        with open(os.path.join(work, records.CLASSES), 'wb') as file:
            file.write(classes)
            file.flush()
            os.fsync(file.fileno())
        splits = {split: {key: value for key, value in progress.items() if key != 'next'}
                  for split, progress in state['splits'].items()}
        manifest = {'format': records.MANIFEST_FORMAT,
                    **{key: state[key] for key in ('resize', 'quality', 'seed', 'counted', *examine.NAMED)},
                    'num_classes': len(state['lines']), 'classes_sha256': hashlib.sha256(classes).hexdigest(),
                    'splits': splits}
        write_text(path, json.dumps(manifest, indent=1))
    manifest = read_json(path, f'remove {work} to start again')
    for name in [*FILES, records.MANIFEST]:
        if os.path.exists(os.path.join(work, name)):
            os.replace(os.path.join(work, name), os.path.join(out, name))
    folder = os.open(out, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    shutil.rmtree(work)
    return manifest


def _summary(out, manifest):
    splits = manifest['splits']
    return '{}: {:,} training and {:,} validation images of {:,} classes, {:,.1f} MB ({})'.format(
        out, splits['train']['num_images'], splits['val']['num_images'], manifest['num_classes'],
        sum(split['rec_bytes'] for split in splits.values()) / 1e6, _options(manifest))


class _Progress:
    """A progress bar, or plain lines now and then where there is no terminal."""

    def __init__(self, title, total=None, done=0, unit='images'):
        self.title, self.total, self.unit = title, total, unit
        self.first = self.done = done
        self.started = self.told_at = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, desc=title, unit=f' {unit}', unit_scale=unit == 'bytes',
                            leave=False)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()

    def advance(self, number):
        self.done += number
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(number)
        elif now - self.told_at >= TELL_SECONDS:
            self.told_at = now
            rate = (self.done - self.first) / (now - self.started)
            of_total, left = '', ''
            if self.total is not None:
                of_total = f' of {self.total:,}'
                left = f', {tqdm.format_interval((self.total - self.done) / max(rate, 1e-9))} left'
            print(f'{self.title}: {self.done:,}{of_total} {self.unit}, {rate:,.0f} {self.unit}/s{left}', flush=True)
