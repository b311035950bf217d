"""The packed form of a data set: RecordIO files of JPEG images, their index, the classes and a manifest.

A folder holds `train.rec`, `train.idx`, `val.rec`, `val.idx`, `classes.txt` and, written last, `manifest.json`. The
records are those of `mx.recordio.pack`, so that MXNet's own readers take them as they are. Nothing in a file is
trusted: a cut or damaged one aborts the process in MXNet's C++ reader, and is a UserError here.
"""
import hashlib
import json
import os
import struct
import warnings

import numpy as np

from gn_gluon.errors import UserError

MANIFEST_FORMAT = 1
MANIFEST = 'manifest.json'
CLASSES = 'classes.txt'
SPLITS = ('train', 'val')

#: Begins every part of a record; then the part's length in the lower 29 bits and its place in the upper three.
MAGIC = 0xced7230a
PART = struct.Struct('<II')
LENGTH_BITS = 29
WHOLE, FIRST, MIDDLE, LAST = range(4)
#: Flag (0: one label), label, id and a second id, which is unused: `mx.recordio.IRHeader`.
HEADER = struct.Struct('<IfQQ')


def read_manifest(folder):
    """The manifest of a packed data set, after a look at the files it speaks of: a dict.

    Raises UserError when there is none, when it is damaged or of another format, and when a file is missing or not of
    the size that was packed.
    """
    path = os.path.join(folder, MANIFEST)
    if not os.path.exists(path):
        raise UserError(f'{path} not found, so {folder} is not a packed data set; make one with: '
                        f'python tools/pack_imagenet.py --src FOLDER --out {folder}')
    try:
        with open(path, encoding='utf-8') as file:
            manifest = json.load(file)
        found_format = manifest['format']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} cannot be read as the manifest of a packed data set '
                        f'({type(error).__name__}: {error}); pack it again') from None
    if found_format != MANIFEST_FORMAT:
        raise UserError(f'{path} is of format {found_format}, but this version reads format {MANIFEST_FORMAT}; '
                        'pack the data set again')
    try:
        sizes = {f'{split}.{kind}': int(manifest['splits'][split][f'{kind}_bytes'])
                 for split in SPLITS for kind in ('rec', 'idx')}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{path} lacks what a manifest says ({type(error).__name__}: {error}); '
                        'pack it again') from None
    for name, size in sizes.items():
        file = os.path.join(folder, name)
        if not os.path.exists(file):
            raise UserError(f'{file} not found, but {MANIFEST} beside it says that it was packed; copy it anew or '
                            'pack it again')
        if os.path.getsize(file) != size:
            raise UserError(f'{file} has {os.path.getsize(file)} bytes, not the {size} that were packed; copy it anew '
                            'or pack it again')
    return manifest


def read_classes(folder, manifest):
    """The lines of classes.txt in the order of the labels: `synset` or `synset<TAB>words`. UserError if changed."""
    path = os.path.join(folder, CLASSES)
    try:
        with open(path, 'rb') as file:
            data = file.read()
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}); copy it anew or pack it again') from None
    if hashlib.sha256(data).hexdigest() != manifest['classes_sha256']:
        raise UserError(f'{path} is not the file that was packed; copy it anew or pack it again')
    return data.decode('utf-8').splitlines()


def read_index(folder, split, manifest):
    """Where each record of `split` ('train' or 'val') begins: (n,) int64. UserError for an index that cannot be."""
    path = os.path.join(folder, f'{split}.idx')
    number, size = manifest['splits'][split]['num_images'], manifest['splits'][split]['rec_bytes']
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)  # NumPy warns of text after the last number: seen below
        try:
            rows = np.fromfile(path, np.int64, sep=' ')
        except (OSError, ValueError) as error:
            raise UserError(f'{path} cannot be read ({error}); copy it anew or pack it again') from None
    if len(rows) != 2 * number:
        raise UserError(f'{path} does not hold the {number} lines that were packed; copy it anew or pack it again')
    ids, offsets = rows.reshape(number, 2).T
    if (not np.array_equal(ids, np.arange(number)) or (offsets[:1] != 0).any() or (np.diff(offsets) <= 0).any()
            or (offsets[-1:] >= size).any()):
        raise UserError(f'{path} does not index {split}.rec: its lines must be 0 to {number - 1} and offsets that '
                        f'rise from 0 and stay below {size}; copy it anew or pack it again')
    return np.ascontiguousarray(offsets)


def write_record(label, number, image):
    """One record: image bytes, their label (int) and the record's number in the file. Returns bytes.

    Where the magic number lies at a multiple of four bytes in the image, the record is parted there and the number
    left out, as RecordIO demands: its readers look for the number to find where records begin.
    """
    header = HEADER.pack(0, label, number, 0)
    places = np.flatnonzero(np.frombuffer(image, '<u4', len(image) // 4) == MAGIC)
    if not len(places):
        length = len(header) + len(image)
        return b''.join((PART.pack(MAGIC, length), header, image, bytes(-length % 4)))
    data = header + image
    ends = [len(header) + 4 * place for place in places.tolist()] + [len(data)]
    starts = [0] + [end + 4 for end in ends[:-1]]
    kinds = [FIRST] + [MIDDLE] * (len(ends) - 2) + [LAST]
    return b''.join(PART.pack(MAGIC, kind << LENGTH_BITS | end - start) + data[start:end] + bytes(-(end - start) % 4)
                    for kind, start, end in zip(kinds, starts, ends))


class RecordFile:
    """Random access to the records of a .rec file, from any number of threads and forked processes.

    Arguments:
        path: the .rec file.
        offsets: (n,) int64 as `read_index` returns them.
    """

    def __init__(self, path, offsets):
        self.path = path
        self.offsets = offsets
        self.file = open(path, 'rb', buffering=0)
        self.size = os.fstat(self.file.fileno()).st_size

    def __len__(self):
        return len(self.offsets)

    def read(self, i):
        """Record `i`: (label as int, JPEG image as a memoryview, id). UserError names file and record if damaged."""
        content = self._join(i, self.read_bytes(i, i + 1))
        return self._label(i, content), content[HEADER.size:], i

    def label(self, i):
        """The label of record `i`, without reading its image."""
        start = int(self.offsets[i])
        return self._label(i, self._bytes(i, start, start + PART.size + HEADER.size)[PART.size:])

    def _bytes(self, i, start, end):
        try:
            # No position is moved: other threads and processes may read through the same descriptor.
            data = os.pread(self.file.fileno(), end - start, start)
        except OSError as error:
            raise self.damaged(i, f'reading it fails: {error.strerror}') from None
        if len(data) != end - start:
            raise self.damaged(i, f'it ends after {len(data)} of {end - start} bytes')
        return memoryview(data)  # parts of it are not copies

    def _label(self, i, content):
        if len(content) < HEADER.size:
            raise self.damaged(i, 'it is shorter than the header of an image')
        flag, label, number, _ = HEADER.unpack_from(content)
        if flag != 0 or number != i or not label.is_integer():
            raise self.damaged(i, f'its header says flag {flag}, label {label}, id {number}')
        return int(label)

    def read_bytes(self, start, stop):
        """The bytes of the file from record `start` to the beginning of record `stop`, unchecked: memoryview."""
        end = int(self.offsets[stop]) if stop < len(self.offsets) else self.size
        return self._bytes(start, int(self.offsets[start]), end)

    def _join(self, i, data):
        """The content of a record, of whose parts `data` must consist and of nothing else."""
        magic, word = PART.unpack_from(data) if len(data) >= PART.size else (0, 0)
        if magic == MAGIC and word >> LENGTH_BITS == WHOLE and PART.size + word + -word % 4 == len(data):
            return data[PART.size:PART.size + word]
        parts, place, kind = [], 0, None
        while place + PART.size <= len(data) and kind not in (WHOLE, LAST):
            magic, word = PART.unpack_from(data, place)
            before, kind, length = kind, word >> LENGTH_BITS, word & (1 << LENGTH_BITS) - 1
            if magic != MAGIC or kind not in ((FIRST,) if before is None else (MIDDLE, LAST)):
                raise self.damaged(i, f'no part of a record begins at byte {int(self.offsets[i]) + place}')
            place += PART.size
            parts.append(data[place:place + length])
            place += length + -length % 4
        if kind != LAST or place != len(data):
            raise self.damaged(i, 'its length is not that which the index gives')
        return memoryview(PART.pack(MAGIC, 0)[:4].join(parts))

    def damaged(self, i, what):
        return UserError(f'{self.path}: record {i} is damaged ({what}); copy the file anew or pack it again')
