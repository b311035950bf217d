"""Where the images to pack come from: ImageNet's official archives, or folders; found and listed, never unpacked."""
import contextlib
import io
import os
import posixpath
import re
import tarfile

import numpy as np
import scipy.io

from gn_gluon.errors import UserError

TRAIN_ARCHIVE = 'ILSVRC2012_img_train.tar'
VALIDATION_ARCHIVE = 'ILSVRC2012_img_val.tar'
DEVKIT = 'ILSVRC2012_devkit_t12'
META = 'meta.mat'
GROUND_TRUTH = 'ILSVRC2012_validation_ground_truth.txt'
ANNOTATIONS = 'val_annotations.txt'
#: What the name of an image ends with, in small letters. Other files, as lists of boxes, are passed over.
SUFFIXES = ('.jpeg', '.jpg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.gif')


class Source:
    """The images below one folder, in whichever of the known layouts they are.

    Arguments:
        folder: holds, for each split, the official archive or a folder.
            Training: `ILSVRC2012_img_train.tar` (a tar of one tar for each class) or `train/CLASS/*` (also
            `train/CLASS/images/*`); where there is nothing of that kind, the folders in `folder` are the classes.
            Validation: `ILSVRC2012_img_val.tar` with the devkit, `val/CLASS/*`, `val/*` with the devkit, or
            `val/images/*` with `val/val_annotations.txt` (Tiny ImageNet); or none.
            The devkit is `ILSVRC2012_devkit_t12.tar.gz`, or the folder that it unpacks to.

    Attributes:
        classes: names of the classes (synsets), sorted: their places are the labels.
        words: dict from class to what it is called, as far as the devkit or words.txt says it.
        splits: {'train': Images, 'val': Images}.

    Raises UserError in one sentence for what is missing or contradicts itself.
    """

    def __init__(self, folder):
        if not os.path.isdir(folder):
            raise UserError(f'--src {folder} is not a folder; give the one that holds {TRAIN_ARCHIVE} or train/')
        self.folder = folder
        self.devkit = Devkit(folder)
        train = self._find_train()
        self.classes = train.classes()
        for name in self.classes:
            if '\t' in name or len(name.splitlines()) != 1 or name != name.encode('utf-8', 'replace').decode('utf-8'):
                raise UserError(f'{os.path.join(folder, train.title)} holds the class {name!a}, whose name is not one '
                                'line of UTF-8 text; rename it')
        train.labels = {name: label for label, name in enumerate(self.classes)}
        validation = self._find_validation()
        validation.labels = train.labels
        self.splits = {'train': train, 'val': validation}
        self.words = self.devkit.words() if self.devkit.path else _read_words(os.path.join(folder, 'words.txt'))

    def _find_train(self):
        archive = os.path.join(self.folder, TRAIN_ARCHIVE)
        if os.path.exists(archive):
            return ClassArchives(archive)
        if os.path.isdir(os.path.join(self.folder, 'train')):
            return ClassFolders(self.folder, 'train')
        others = [os.path.join(self.folder, name) for name in ('val', VALIDATION_ARCHIVE)]
        if not _folders(self.folder) or any(map(os.path.exists, others)):
            raise UserError(f'--src {self.folder} holds neither {TRAIN_ARCHIVE} nor a folder train, nor folders of one '
                            'class each; give the folder that does')
        return ClassFolders(self.folder, '')

    def _find_validation(self):
        archive, tree = os.path.join(self.folder, VALIDATION_ARCHIVE), os.path.join(self.folder, 'val')
        if os.path.exists(archive):
            return NumberedArchive(archive, self.devkit)
        if not os.path.isdir(tree):
            return Images('none')
        if os.path.exists(os.path.join(tree, ANNOTATIONS)):
            return AnnotatedFolder(self.folder)
        if not _folders(tree):
            return NumberedFolder(self.folder, self.devkit)
        loose = _files(tree, _is_image)
        if loose:
            raise UserError(f'{tree} holds both folders and loose images ({loose[0][0]}); leave there either the '
                            f'folders of the classes or, with {DEVKIT}, the images alone')
        return ClassFolders(self.folder, 'val')


class Images:
    """The images of one split; this one has none.

    Attributes:
        title: the archive or folder, as the user knows it; names of images begin there.
        folder: what the names of files are relative to; None for an archive.
        archive: path of the archive that the offsets are in; None for files.
        labels: dict from class to label, given by Source.
        num_passed_over, passed_over: how many files are no images by their name, and one of them.
    """

    folder = None
    archive = None
    labels = None

    def __init__(self, title):
        self.title = title
        self.num_passed_over = 0
        self.passed_over = None

    def listing(self):
        """Yields (label, name, offset, size), sorted by label, then by the name of the file: in every layout alike."""
        return iter(())

    def stamps(self):
        """What changes when images are added or removed: a list that JSON can hold."""
        return []

    def take(self, name):
        """Whether the file is an image by its name."""
        if _is_image(name):
            return True
        self.num_passed_over += 1
        self.passed_over = self.passed_over or name
        return False

    def label_of(self, name, where):
        """The label of class `name`, which `where` speaks of."""
        if name not in self.labels:
            raise UserError(f'{where} names the class {name}, of which there are no training images; complete them, or '
                            'remove its validation images')
        return self.labels[name]


class ClassFolders(Images):
    """`CLASS/*` or `CLASS/images/*` below a folder."""

    def __init__(self, folder, title):
        super().__init__(title)
        self.folder = folder
        self.root = os.path.join(folder, title)

    def classes(self):
        names = _folders(self.root)
        if not names:
            raise UserError(f'{self.root} holds no folders of one class each; unpack the images there')
        return names

    def listing(self):
        for name in self.classes():
            label = self.label_of(name, self.root)
            inner = self._inner(name)
            files = _files(os.path.join(self.folder, inner), self.take)
            if not files:
                raise UserError(f'{os.path.join(self.folder, inner)} holds no images ({", ".join(SUFFIXES)}); complete '
                                'or remove it')
            for file, size in files:
                yield label, posixpath.join(inner, file), 0, size

    def _inner(self, name):
        """The folder of a class, below self.folder."""
        inner = posixpath.join(self.title, name)
        images = posixpath.join(inner, 'images')
        return images if os.path.isdir(os.path.join(self.folder, images)) else inner

    def stamps(self):
        return [_stamp(self.root)] + [_stamp(os.path.join(self.folder, self._inner(name))) for name in self.classes()]


class AnnotatedFolder(Images):
    """Tiny ImageNet's `val/images/*`, whose classes are in `val/val_annotations.txt`."""

    def __init__(self, folder):
        super().__init__('val')
        self.folder = folder
        self.path = os.path.join(folder, 'val', ANNOTATIONS)

    def listing(self):
        rows = []
        for number, line in enumerate(_read_text(self.path).splitlines(), 1):
            file, _, rest = line.partition('\t')
            if not rest or os.path.basename(file) != file:
                raise UserError(f'{self.path}: line {number}, {line!r}, does not name an image and its class; fetch '
                                'the file anew')
            rows.append((self.label_of(rest.partition('\t')[0], self.path), f'val/images/{file}'))
        for label, name in sorted(rows):
            path = os.path.join(self.folder, name)
            with _reading(path):
                size = os.path.getsize(path)
            yield label, name, 0, size

    def stamps(self):
        return [_stamp(self.path), _stamp(os.path.join(self.folder, 'val', 'images'))]


class ClassArchives(Images):
    """The official training archive: a tar of tars, one for each class."""

    def __init__(self, archive):
        super().__init__(os.path.basename(archive))
        self.archive = archive
        self.members = None

    def classes(self):
        self.members = {}
        with _reading(self.archive), open(self.archive, 'rb') as opened:
            for name, offset, size in _tar_members(opened, self.archive):
                if not name.endswith('.tar'):
                    raise UserError(f'{self.archive} holds {name}, which is not the .tar of a class; fetch the '
                                    'official archive anew')
                self.members[posixpath.basename(name)[:-len('.tar')]] = offset, size
        if not self.members:
            raise UserError(f'{self.archive} is empty; fetch it anew')
        return sorted(self.members)

    def listing(self):
        with _reading(self.archive), open(self.archive, 'rb') as opened:
            for name, label in self.labels.items():
                start, length = self.members[name]
                part = _Part(opened, start, length)
                rows = sorted((posixpath.basename(file), offset, size)
                              for file, offset, size in _tar_members(part, f'{name}.tar in {self.archive}')
                              if self.take(file))
                if not rows:
                    raise UserError(f'{name}.tar in {self.archive} holds no images; fetch it anew')
                for file, offset, size in rows:
                    yield label, posixpath.join(self.title, name, file), start + offset, size

    def stamps(self):
        return [_stamp(self.archive)]


class _Numbered(Images):
    """Validation images whose place in the devkit's ground truth is the number in their names."""

    def __init__(self, title, devkit):
        super().__init__(title)
        self.devkit = devkit

    def listing(self):
        truth = self.devkit.truth()
        found, rows = np.zeros(len(truth), bool), []
        for name, offset, size in self.files():
            match = re.search(r'_(\d+)\.\w+$', name)
            number = int(match.group(1)) if match else 0
            if not 1 <= number <= len(truth) or found[number - 1]:
                raise UserError(f'{posixpath.basename(name)} in {self.title} does not bear a number of its own from 1 '
                                f'to {len(truth)}, the lines of {GROUND_TRUTH}; put the official images there')
            found[number - 1] = True
            rows.append((self.label_of(truth[number - 1], self.devkit.path), name, offset, size))
        if not found.all():
            raise UserError(f'{self.title} holds {found.sum()} of the {len(truth)} images in {GROUND_TRUTH}, and not '
                            f'number {int(np.argmin(found)) + 1}; complete it')
        return iter(sorted(rows))


class NumberedFolder(_Numbered):
    """Validation images in one folder, with the devkit."""

    def __init__(self, folder, devkit):
        super().__init__('val', devkit)
        self.folder = folder
        self.root = os.path.join(folder, 'val')
        if not _files(self.root, _is_image):
            raise UserError(f'{self.root} holds no images; put them there, or remove the folder to pack training '
                            'images only')
        devkit.require(self.root)

    def files(self):
        return ((posixpath.join('val', file), 0, size) for file, size in _files(self.root, self.take))

    def stamps(self):
        return [_stamp(self.root), _stamp(self.devkit.path)]


class NumberedArchive(_Numbered):
    """The official validation archive, with the devkit."""

    def __init__(self, archive, devkit):
        super().__init__(os.path.basename(archive), devkit)
        self.archive = archive
        devkit.require(archive)

    def files(self):
        with _reading(self.archive), open(self.archive, 'rb') as opened:
            for file, offset, size in _tar_members(opened, self.archive):
                if self.take(file):
                    yield posixpath.join(self.title, posixpath.basename(file)), offset, size

    def stamps(self):
        return [_stamp(self.archive), _stamp(self.devkit.path)]


class Devkit:
    """ImageNet's development kit: the classes of the validation images, and the words for them.

    Its ground truth gives each image an ILSVRC2012_ID, which is not the label: IDs follow no order of the synsets, and
    meta.mat says which is which.
    """

    def __init__(self, folder):
        candidates = [os.path.join(folder, DEVKIT), os.path.join(folder, DEVKIT + '.tar.gz')]
        self.path = next((path for path in candidates if os.path.exists(path)), None)
        self.meta = None

    def require(self, where):
        if self.path is None:
            raise UserError(f'{where} names its images by number, so {DEVKIT}.tar.gz is needed beside it to know their '
                            'classes; fetch it where the images came from')

    def words(self):
        """dict from synset to its words."""
        return dict(self._synsets().values())

    def truth(self):
        """The synset of each validation image, in the order of their numbers: list of str."""
        synsets = self._synsets()
        numbers = self._read(GROUND_TRUTH).decode('ascii', 'replace').split()
        for line, number in enumerate(numbers, 1):
            if not number.isdigit() or int(number) not in synsets:
                raise UserError(f'{GROUND_TRUTH} in {self.path} gives image {line} the ID {number}, which {META} does '
                                'not know; fetch the devkit anew')
        return [synsets[int(number)][0] for number in numbers]

    def _synsets(self):
        """dict from ILSVRC2012_ID to (synset, words), of the classes that have images of their own."""
        if self.meta is None:
            try:
                table = np.atleast_1d(scipy.io.loadmat(io.BytesIO(self._read(META)), squeeze_me=True)['synsets'])
                # Above the 1,000 classes the table goes on with those of the hierarchy that have children.
                self.meta = {int(row['ILSVRC2012_ID']): (str(row['WNID']), ' '.join(str(row['words']).split()))
                             for row in table if row['num_children'] == 0}
            except UserError:
                raise
            except Exception as error:  # a damaged file raises nearly anything
                raise UserError(f'{META} in {self.path} cannot be read as the table of synsets '
                                f'({type(error).__name__}: {error}); fetch the devkit anew') from None
        return self.meta

    def _read(self, name):
        if os.path.isdir(self.path):
            path = os.path.join(self.path, 'data', name)
            with _reading(path), open(path, 'rb') as file:
                return file.read()
        try:
            with tarfile.open(self.path) as opened:
                for member in opened:
                    if member.isreg() and posixpath.basename(member.name) == name:
                        return opened.extractfile(member).read()
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(f'{self.path} cannot be read ({error}); fetch it anew') from None
        raise UserError(f'{self.path} holds no {name}; fetch it anew')


class _Part(io.RawIOBase):
    """The bytes of a file from `start` on, `length` of them, as a file."""

    def __init__(self, opened, start, length):
        self.opened, self.start, self.length, self.place = opened, start, length, 0

    def tell(self):
        return self.place

    def seek(self, place, whence=os.SEEK_SET):
        self.place = place + {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.length}[whence]
        return self.place

    def read(self, size=-1):
        left = max(0, self.length - self.place)
        size = left if size < 0 else min(size, left)
        data = os.pread(self.opened.fileno(), size, self.start + self.place)
        self.place += len(data)
        return data


def _tar_members(opened, title):
    """Yields (name, offset, size) of the files in an open tar. UserError where it is cut or damaged."""
    try:
        with tarfile.open(fileobj=opened, mode='r:') as archive:
            while True:
                member = archive.next()
                if member is None:
                    break
                archive.members = []  # a million of them would be kept otherwise
                if member.isreg() and not member.issparse():
                    yield member.name, member.offset_data, member.size
                elif not member.isdir():
                    raise UserError(f'{title} holds {member.name}, which is not a plain file; fetch it anew')
            # tarfile takes what it cannot read for the end
            opened.seek(archive.offset)
            end = opened.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f'{title} is cut or damaged ({error}); fetch it anew') from None
    if end != bytes(tarfile.BLOCKSIZE):
        raise UserError(f'{title} is cut or damaged (no end of archive at byte {archive.offset}); fetch it anew')


def _is_image(name):
    base = posixpath.basename(name)
    return base.lower().endswith(SUFFIXES) and not base.startswith('.')  # as ._x.JPEG, which macOS leaves behind


def _folders(path):
    """Names of the folders in a folder, sorted, hidden ones aside."""
    with _reading(path), os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith('.'))


def _files(path, take):
    """(name, size) of the images in a folder, sorted."""
    with _reading(path), os.scandir(path) as entries:
        return sorted((entry.name, entry.stat().st_size)
                      for entry in entries if not entry.is_dir() and take(entry.name))


def _read_words(path):
    """What words.txt calls the classes, if it is there."""
    if not os.path.exists(path):
        return {}
    lines = (line.partition('\t') for line in _read_text(path).splitlines())
    return {name: ' '.join(words.split()) for name, _, words in lines if words}


def _read_text(path):
    with _reading(path), open(path, encoding='utf-8', errors='replace') as file:
        return file.read()


def _stamp(path):
    with _reading(path):
        status = os.stat(path)
    return [os.path.basename(path), status.st_size, status.st_mtime_ns]


@contextlib.contextmanager
def _reading(path):
    try:
        yield
    except OSError as error:
        raise UserError(f'{error.filename or path} cannot be read ({error.strerror or error}); make it readable or '
                        'remove it') from None
