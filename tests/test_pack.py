"""Packing: all layouts give the same bytes, nothing bad gets in unnamed, and a kill at any instant changes nothing."""
import concurrent.futures
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import resource
import runpy
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import cv2
import mxnet as mx
import numpy as np
import PIL.Image
import pytest
import scipy.io

from gn_gluon import pack as packing
from gn_gluon.checkpoint import signals_as_interrupts
from gn_gluon.data import records, sources
from gn_gluon.errors import UserError, command
from gn_gluon.workers import Workers

HERE = os.path.dirname(os.path.abspath(__file__))
SHARED = os.path.join(HERE, '..', '..', 'shared', 'data')
TOOL = os.path.join(HERE, '..', 'tools', 'pack_imagenet.py')

#: In the order of their ILSVRC2012_IDs, which is not that of their names: n05 is ID 1 and label 2, and so on.
SYNSETS = ['n05', 'n01', 'n09', 'n03']
CLASSES = sorted(SYNSETS)


def noise(seed, height=48, width=64):
    """Smooth noise, so that JPEG keeps it nearly as it is: (height, width, 3) uint8."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def encoded(image, kind='JPEG', **options):
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_tree(folder, per_class=5, num_validation=10):
    """train/CLASS/*, and the validation images in class folders; returns {file name: class} of the latter."""
    for number, synset in enumerate(SYNSETS):
        for i in range(per_class):
            write(folder / 'train' / synset / f'{synset}_{i}.JPEG', encoded(noise(100 * number + i), quality=90))
    truth = {f'ILSVRC2012_val_{i + 1:08d}.JPEG': SYNSETS[i * i % 4] for i in range(num_validation)}
    for i, (name, synset) in enumerate(truth.items()):
        write(folder / 'val' / synset / name, encoded(noise(5000 + i)))
    return truth


def write_devkit(folder, truth):
    """A devkit whose meta.mat has, as the official one, rows for groups of classes too."""
    rows = [(i + 1, synset, f'{synset} word, other word', 0) for i, synset in enumerate(SYNSETS)]
    rows.append((len(rows) + 1, 'n99', 'group', 2))
    table = np.array([tuple(row) for row in rows], [('ILSVRC2012_ID', object), ('WNID', object), ('words', object),
                                                   ('num_children', object)])
    (folder / 'data').mkdir(parents=True)
    scipy.io.savemat(str(folder / 'data' / sources.META), {'synsets': table.reshape(-1, 1)})
    (folder / 'data' / sources.GROUND_TRUTH).write_text(
        ''.join(f'{SYNSETS.index(synset) + 1}\n' for synset in truth.values()))


def add(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write_archives(folder, tree, truth):
    """The tree as ImageNet is published, the members of each archive in an order of their own."""
    folder.mkdir()
    with tarfile.open(folder / sources.TRAIN_ARCHIVE, 'w') as outer:
        for synset in SYNSETS:
            inner_bytes = io.BytesIO()
            with tarfile.open(fileobj=inner_bytes, mode='w') as inner:
                for path in sorted((tree / 'train' / synset).iterdir(), reverse=True):
                    add(inner, path.name, path.read_bytes())
            add(outer, f'{synset}.tar', inner_bytes.getvalue())
    with tarfile.open(folder / sources.VALIDATION_ARCHIVE, 'w') as archive:
        for name in sorted(truth, reverse=True):
            add(archive, name, (tree / 'val' / truth[name] / name).read_bytes())
    write_devkit(folder / 'kit', truth)
    with tarfile.open(folder / f'{sources.DEVKIT}.tar.gz', 'w:gz') as archive:
        archive.add(folder / 'kit', sources.DEVKIT)
    shutil.rmtree(folder / 'kit')


def content(out):
    """What must be the same however a set was packed: the bytes of each file."""
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in sorted(os.listdir(out))}


def read_all(out, split='train'):
    """[(label, image bytes)] of the records in their order."""
    manifest = records.read_manifest(str(out))
    opened = records.RecordFile(str(out / f'{split}.rec'), records.read_index(str(out), split, manifest))
    return [(label, bytes(image)) for label, image, _ in map(opened.read, range(len(opened)))]


def refused(call, *words):
    """The call must fail with one sentence that has all `words` in it."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert '\n' not in message
    for word in words:
        assert word in message, message


@pytest.fixture
def tree(tmp_path):
    write_tree(tmp_path / 'tree')
    return tmp_path / 'tree'


@pytest.fixture
def small_tasks(monkeypatch):
    """Many tasks for few images, and the state saved after each of them, before the next."""
    class AtOnce(concurrent.futures.ThreadPoolExecutor):
        def submit(self, *call):
            saving = super().submit(*call)
            concurrent.futures.wait([saving])
            return saving

    monkeypatch.setattr(packing.concurrent.futures, 'ThreadPoolExecutor', AtOnce)
    monkeypatch.setattr(packing, 'IMAGES_PER_TASK', 2)
    monkeypatch.setattr(packing, 'SAVE_SECONDS', 0)


# ------------------------------------------------------------------------------------------------- real images

@pytest.fixture(scope='module')
def sample(tmp_path_factory):
    """The 1,000 real images, one of each class."""
    if not os.path.exists(os.path.join(SHARED, 'unpack.py')):
        pytest.skip(f'needs the images in {SHARED}')
    folder = tmp_path_factory.mktemp('imagenet-sample')
    subprocess.run([sys.executable, os.path.join(SHARED, 'unpack.py'), 'imagenet-sample', str(folder)], check=True,
                   stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture(scope='module')
def packed_sample(sample, tmp_path_factory):
    out = tmp_path_factory.mktemp('packed')
    packing.pack(str(sample), str(out), workers=2)
    return out


def test_real_images_keep_their_bytes_and_are_in_random_order(sample, packed_sample):
    synsets = sorted(os.listdir(sample / 'train'))
    files = {label: next((sample / 'train' / synset).iterdir()) for label, synset in enumerate(synsets)}
    packed = read_all(packed_sample)
    labels = [label for label, _ in packed]
    assert sorted(labels) == list(range(1000))
    assert np.abs(np.diff(labels)).mean() > 250  # a third of 1,000 in a random order, 1 in that of the folders
    for label, image in packed:
        assert image == files[label].read_bytes()
    manifest = records.read_manifest(str(packed_sample))
    assert (packed_sample / records.CLASSES).read_text().splitlines() == synsets
    assert manifest['counted'] == {'grayscale': 23, 'exif_orientation': 1, 'other_format': 0, 'resized': 0}
    assert not any(manifest[kind] for kind in ('left_out', 'converted', 'warned'))


def test_mxnets_own_readers_take_the_files(packed_sample):
    rec, idx = (str(packed_sample / f'train.{kind}') for kind in ('rec', 'idx'))
    expected = read_all(packed_sample)
    reader = mx.recordio.MXIndexedRecordIO(idx, rec, 'r')
    for number in (0, 1, 500, 999):
        header, image = mx.recordio.unpack(reader.read_idx(number))
        assert (header.label, header.id, image) == (expected[number][0], number, expected[number][1])
    iterator = mx.io.ImageRecordIter(path_imgrec=rec, path_imgidx=idx, data_shape=(3, 32, 32), batch_size=100,
                                     resize=32, preprocess_threads=2)
    labels = np.concatenate([batch.label[0].asnumpy() for batch in iterator])
    np.testing.assert_array_equal(labels, [label for label, _ in expected])


def test_verify_finds_one_flipped_byte(packed_sample, tmp_path, capsys):
    packing.verify(str(packed_sample), workers=2)
    assert 'every image decodes' in capsys.readouterr().out
    copy = tmp_path / 'copy'
    shutil.copytree(packed_sample, copy)
    with open(copy / 'train.rec', 'r+b') as file:
        file.seek(12_345_678)
        byte = file.read(1)[0]
        file.seek(12_345_678)
        file.write(bytes([byte ^ 1]))
    refused(lambda: packing.verify(str(copy), workers=2), 'damaged', 'train.rec')


def test_reduced_images_are_not_larger_not_turned_and_not_enlarged(sample, tmp_path):
    packing.pack(str(sample), str(tmp_path / 'out'), resize=128, quality=90, workers=2)
    turned = next((sample / 'train' / 'n02951585').iterdir())  # its EXIF orientation says to turn it
    small = next((sample / 'train' / 'n01871265').iterdir())  # 75 x 56
    synsets = sorted(os.listdir(sample / 'train'))
    images = {synsets[label]: image for label, image in read_all(tmp_path / 'out')}
    sizes = [PIL.Image.open(io.BytesIO(image)).size for image in images.values()]
    assert max(map(min, sizes)) == 128
    assert images['n01871265'] == small.read_bytes()
    original, reduced = PIL.Image.open(turned), PIL.Image.open(io.BytesIO(images['n02951585']))
    assert (original.width > original.height) == (reduced.width > reduced.height)
    assert not reduced.getexif()
    expected = cv2.resize(np.asarray(original.convert('RGB')), reduced.size, interpolation=cv2.INTER_AREA)
    assert np.abs(np.asarray(reduced).astype(int) - expected).mean() < 4


# ------------------------------------------------------------------------------------------------- layouts

def test_archives_and_folders_give_the_same_bytes_and_ids_are_mapped_through_meta_mat(tmp_path):
    tree = tmp_path / 'tree'
    truth = write_tree(tree)
    write_archives(tmp_path / 'archives', tree, truth)
    flat = tmp_path / 'flat'
    shutil.copytree(tree / 'train', flat / 'train')
    (flat / 'val').mkdir()
    for name, synset in truth.items():
        shutil.copy(tree / 'val' / synset / name, flat / 'val' / name)
    write_devkit(flat / sources.DEVKIT, truth)
    for source in ('tree', 'archives', 'flat'):
        packing.pack(str(tmp_path / source), str(tmp_path / f'out_{source}'), workers=2)
    outs = {source: content(tmp_path / f'out_{source}') for source in ('tree', 'archives', 'flat')}
    assert outs['archives'] == outs['flat']
    assert all(outs['tree'][name] == outs['flat'][name] for name in outs['tree'] if name.startswith(('train', 'val')))
    for label, image in read_all(tmp_path / 'out_archives', 'val'):
        name = next(name for name, synset in truth.items() if (tree / 'val' / synset / name).read_bytes() == image)
        assert CLASSES[label] == truth[name]
    lines = (tmp_path / 'out_archives' / records.CLASSES).read_text().splitlines()
    assert lines == [f'{synset}\t{synset} word, other word' for synset in CLASSES]


def test_tiny_imagenets_layout(tmp_path):
    for synset in CLASSES:
        write(tmp_path / 'train' / synset / 'images' / f'{synset}_0.JPEG', encoded(noise(len(synset))))
        write(tmp_path / 'train' / synset / f'{synset}_boxes.txt', b'n01_0.JPEG\t0\t0\t63\t63\n')
    classes = ['n09', 'n01', 'n05']
    for i in range(3):
        write(tmp_path / 'val' / 'images' / f'val_{i}.JPEG', encoded(noise(i)))
    write(tmp_path / 'val' / 'val_annotations.txt',
          ''.join(f'val_{i}.JPEG\t{synset}\t0\t0\t9\t9\n' for i, synset in enumerate(classes)).encode())
    write(tmp_path / 'words.txt', b'n01\ta, b\nn77\tc\n')
    packing.pack(str(tmp_path), str(tmp_path / 'out'), workers=1)
    validation = {image: CLASSES[label] for label, image in read_all(tmp_path / 'out', 'val')}
    assert validation == {encoded(noise(i)): synset for i, synset in enumerate(classes)}
    assert len(read_all(tmp_path / 'out')) == 4
    assert (tmp_path / 'out' / records.CLASSES).read_text().splitlines() == ['n01\ta, b', 'n03', 'n05', 'n09']


def test_folders_of_one_class_each_without_a_split_are_training_images(tree, tmp_path):
    packing.pack(str(tree / 'train'), str(tmp_path / 'out'), workers=1)
    manifest = records.read_manifest(str(tmp_path / 'out'))
    assert [manifest['splits'][split]['num_images'] for split in records.SPLITS] == [20, 0]
    inside = tree / 'train' / 'out'  # would be a class when the same command goes on
    refused(lambda: packing.pack(str(tree / 'train'), str(inside), workers=1), 'in --src', 'another --out')


# ------------------------------------------------------------------------------------------------- bad images

def test_bad_images_are_left_out_or_encoded_anew_and_named(tree, tmp_path, capsys):
    whole = encoded(noise(1), quality=95)
    middle = len(whole) // 2
    cmyk = io.BytesIO()
    PIL.Image.fromarray(noise(2)).convert('CMYK').save(cmyk, 'JPEG', quality=95)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    oriented = encoded(noise(4), exif=exif)
    files = {'cut.JPEG': whole[:-200], 'cut_with_end.JPEG': whole[:middle] + b'\xff\xd9', 'empty.JPEG': b'',
             'text.JPEG': b'<html>not found</html>', 'cut.png': encoded(noise(3), 'PNG')[:-500],
             'cmyk.JPEG': cmyk.getvalue(), 'disguised.JPEG': encoded(noise(3), 'PNG'),
             'open.png': encoded(noise(3), 'PNG'), 'oriented.JPEG': oriented,
             'gray.JPEG': encoded(noise(5)[..., 0]), 'stray.JPEG': whole[:-2] + bytes(99) + whole[-2:]}
    for name, data in files.items():
        write(tree / 'train' / 'n03' / name, data)
    packing.pack(str(tree), str(tmp_path / 'out'), workers=2)
    manifest = records.read_manifest(str(tmp_path / 'out'))
    named = {kind: sorted(os.path.basename(entry['file']) for entry in manifest[kind])
             for kind in ('left_out', 'converted', 'warned')}
    assert named == {'left_out': ['cut.JPEG', 'cut.png', 'cut_with_end.JPEG', 'empty.JPEG', 'text.JPEG'],
                     'converted': ['cmyk.JPEG', 'disguised.JPEG'], 'warned': ['stray.JPEG']}
    assert all(entry['reason'] for kind in named for entry in manifest[kind])
    assert manifest['counted'] == {'grayscale': 1, 'exif_orientation': 1, 'other_format': 1, 'resized': 0}
    assert manifest['splits']['train']['images_per_class'] == [5, 5 + len(files) - 5, 5, 5]
    packed = [image for label, image in read_all(tmp_path / 'out') if label == 1]
    for name in ('oriented.JPEG', 'gray.JPEG', 'stray.JPEG'):
        assert files[name] in packed
    anew = [PIL.Image.open(io.BytesIO(image)) for image in packed if image not in files.values()
            and len(image) not in [path.stat().st_size for path in (tree / 'train' / 'n03').glob('n03*')]]
    assert [(image.format, image.mode) for image in anew] == [('JPEG', 'RGB')] * 3
    for seed in (2, 3, 3):
        assert min(np.abs(np.asarray(image).astype(int) - noise(seed)).mean() for image in anew) < 4
    printed = capsys.readouterr()
    for name in sum(named.values(), []):
        assert name in printed.out
    assert 'left out, see above: 5' in printed.out.splitlines()[-1]
    packing.verify(str(tmp_path / 'out'), workers=1)


def test_a_set_of_nothing_but_bad_images_is_refused(tmp_path):
    write(tmp_path / 'src' / 'train' / 'a' / 'x.jpg', b'no image')
    refused(lambda: packing.pack(str(tmp_path / 'src'), str(tmp_path / 'out'), workers=1), 'none of the 1',
            'not an image')


def part_starts(words):
    """Where the parts of records begin, each after the one before: words of four bytes."""
    starts, place = [], 0
    while place < len(words):
        starts.append(place)
        place += 2 + (int(words[place + 1]) % 2**29 + 3) // 4
    return starts


def test_the_magic_number_inside_an_image_does_not_break_mxnets_readers(tree, tmp_path):
    plain = encoded(noise(7))
    for shift in range(4):
        # a comment, wherever it has to begin so that the number lies at a multiple of four bytes
        comment = b'\0' * shift + (records.MAGIC).to_bytes(4, 'little') * 2
        write(tree / 'train' / 'n01' / f'magic_{shift}.JPEG',
              plain[:2] + b'\xff\xfe' + (2 + len(comment)).to_bytes(2, 'big') + comment + plain[2:])
    packing.pack(str(tree), str(tmp_path / 'out'), workers=1)
    rec, idx = (str(tmp_path / 'out' / f'train.{kind}') for kind in ('rec', 'idx'))
    expected = read_all(tmp_path / 'out')
    originals = {path.read_bytes() for path in (tree / 'train').glob('*/*')}
    assert {image for _, image in expected} == originals
    words = np.fromfile(rec, '<u4')
    assert np.flatnonzero(words == records.MAGIC).tolist() == part_starts(words)
    indexed = mx.recordio.MXIndexedRecordIO(idx, rec, 'r')
    in_sequence = mx.recordio.MXRecordIO(rec, 'r')
    for number, (label, image) in enumerate(expected):
        for data in (indexed.read_idx(number), in_sequence.read()):
            header, found = mx.recordio.unpack(data)
            assert (header.label, found) == (label, image)
    assert in_sequence.read() is None


# ------------------------------------------------------------------------------------------------- interruptions

def in_process(function):
    """Run `function` in a forked process; returns its exit code, negative for a signal."""
    process = multiprocessing.get_context('fork').Process(target=function)
    process.start()
    process.join()  # with a timeout it would wait for the workers too
    return process.exitcode


def pack_until(event, times, action, source, out, **arguments):
    """Pack in a process that does `action()` after so many of: tasks written, states saved, files put in place."""
    def main():
        calls = []

        def counted(original, of_interest):
            def call(*given):
                original(*given)
                calls.extend([1] * of_interest(*given))
                if len(calls) == times and of_interest(*given):
                    action()
            return call

        if event == 'written':
            packing._Run._append = counted(packing._Run._append, lambda *given: True)
        else:
            folder = out / packing.UNFINISHED if event == 'saved' else out
            os.replace = counted(os.replace, lambda old, new: os.path.dirname(new) == str(folder))
        with signals_as_interrupts() as check_signals:
            packing.pack(str(source), str(out), check_signals=check_signals, **arguments)

    return in_process(lambda: command(main))


def end_by(signum):
    return lambda: os.kill(os.getpid(), signum)


@pytest.mark.parametrize('resize', [None, 24])
def test_killed_anywhere_and_resumed_with_other_workers_the_bytes_are_the_same(tree, tmp_path, small_tasks, resize):
    write(tree / 'train' / 'n03' / 'empty.JPEG', b'')  # records and rows are numbered differently from here on
    packing.pack(str(tree), str(tmp_path / 'undisturbed'), resize=resize, workers=1)
    out = tmp_path / 'out'
    for number, (event, times) in enumerate([('saved', 1), ('written', 4), ('saved', 3), ('written', 5), ('saved', 3)]):
        died = pack_until(event, times, end_by(signal.SIGKILL), tree, out, resize=resize, workers=1 + number % 3)
        assert died == -signal.SIGKILL
        state = json.loads((out / packing.UNFINISHED / packing.STATE).read_text())
        assert sum(split['next'] for split in state['splits'].values()) >= 4 * number
        assert not (out / 'train.rec').exists()
        refused(lambda: records.read_manifest(str(out)), 'not a packed data set')
    packing.pack(str(tree), str(out), resize=resize, workers=3)
    assert content(out) == content(tmp_path / 'undisturbed')


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_is_done(tree, tmp_path, small_tasks, signum, monkeypatch):
    monkeypatch.setattr(packing, 'SAVE_SECONDS', 1e9)  # nothing but the signal has it saved
    packing.pack(str(tree), str(tmp_path / 'undisturbed'), workers=2)
    out = tmp_path / 'out'
    assert pack_until('written', 3, end_by(signum), tree, out, workers=2) == 128 + signum
    state = json.loads((out / packing.UNFINISHED / packing.STATE).read_text())
    assert 6 <= state['splits']['train']['next'] < 20
    packing.pack(str(tree), str(out), workers=1)
    assert content(out) == content(tmp_path / 'undisturbed')


def test_killed_while_the_finished_files_are_put_in_place(tree, tmp_path):
    packing.pack(str(tree), str(tmp_path / 'undisturbed'), workers=1)
    out = tmp_path / 'out'
    for times in (1, 3):
        assert pack_until('placed', times, end_by(signal.SIGKILL), tree, out, workers=1) == -signal.SIGKILL
        assert not (out / records.MANIFEST).exists()
    # the manifest is the last
    assert pack_until('placed', 2, end_by(signal.SIGKILL), tree, out, workers=1) == -signal.SIGKILL
    packing.verify(str(out), workers=1)
    packing.pack(str(tree), str(out), workers=1)
    assert content(out) == content(tmp_path / 'undisturbed')


def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(tree, tmp_path, small_tasks, capfd):
    packing.pack(str(tree), str(tmp_path / 'undisturbed'), workers=1)
    limit = (tmp_path / 'undisturbed' / 'train.rec').stat().st_size * 2 // 3
    out = tmp_path / 'out'

    def main():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        packing.pack(str(tree), str(out), workers=1)

    assert in_process(lambda: command(main)) == 2
    error = capfd.readouterr().err
    assert 'error: ' in error and 'make room' in error and 'Traceback' not in error
    packing.pack(str(tree), str(out), workers=1)
    assert content(out) == content(tmp_path / 'undisturbed')


@pytest.mark.parametrize('resize', [None, 24])
def test_too_small_a_disk_is_said_before_it_is_full(tree, tmp_path, monkeypatch, resize):
    free = 10_000 if resize is None else 1000
    monkeypatch.setattr(packing, 'SAMPLE', 4)
    monkeypatch.setattr(packing, 'IMAGES_PER_TASK', 4)
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
    refused(lambda: packing.pack(str(tree), str(tmp_path / 'out'), resize=resize, workers=1), 'GB free', 'make room')
    done = (tmp_path / 'out' / packing.UNFINISHED / 'train.rec').stat().st_size
    assert done < sum(path.stat().st_size for path in tree.glob('train/*/*')) / 2


def test_an_unfinished_folder_is_not_continued_with_other_settings_or_images(tree, tmp_path, small_tasks):
    out = tmp_path / 'out'
    pack_until('written', 2, end_by(signal.SIGKILL), tree, out, workers=1)
    refused(lambda: packing.pack(str(tree), str(out), resize=24, workers=1), '--seed 0', '--resize 24')
    write(tree / 'train' / 'n01' / 'new.JPEG', encoded(noise(0)))
    refused(lambda: packing.pack(str(tree), str(out), workers=1), 'not those', 'unfinished')
    (tree / 'train' / 'n01' / 'new.JPEG').unlink()
    shutil.rmtree(out / packing.UNFINISHED)
    pack_until('written', 2, end_by(signal.SIGKILL), tree, out, workers=1)
    with open(out / packing.UNFINISHED / 'train.rec', 'r+b') as file:  # as after a power failure
        file.write(b'\0\0\0\0')
    refused(lambda: packing.pack(str(tree), str(out), workers=1), 'train.rec', 'to start again')


def test_what_is_packed_already_is_left_alone(tree, tmp_path, capsys):
    out = tmp_path / 'out'
    packing.pack(str(tree), str(out), seed=3, workers=1)
    before = content(out)
    capsys.readouterr()
    packing.pack(str(tree), str(out), seed=3, workers=1)
    assert 'packed already' in capsys.readouterr().out
    refused(lambda: packing.pack(str(tree), str(out), seed=4, workers=1), '--seed 3', '--seed 4')
    refused(lambda: packing.pack(str(tree), str(out), seed=3, resize=24, workers=1), '--resize 24 --quality 95')
    assert content(out) == before
    packing.pack(str(tree), str(tmp_path / 'other'), seed=4, workers=1)
    assert content(tmp_path / 'other')['train.rec'] != before['train.rec']


# ------------------------------------------------------------------------------------------------- bad input

def cut(path, keep):
    with open(path, 'r+b') as file:
        file.truncate(int(path.stat().st_size * keep))


def no_train(folder):
    shutil.rmtree(folder / 'train')
    (folder / sources.TRAIN_ARCHIVE).unlink()


def cut_after_a_class(folder):
    path = folder / sources.TRAIN_ARCHIVE
    with tarfile.open(path) as archive:
        archive.next()
        end = archive.next().offset
    os.truncate(path, end)


def loose_validation(folder):
    write(folder / 'val' / 'ILSVRC2012_val_00000001.JPEG', b'x')


def validation_tree(folder):
    (folder / sources.VALIDATION_ARCHIVE).unlink()
    shutil.copytree(folder.parent / 'tree' / 'val', folder / 'val')


def flat_validation(folder, number=10):
    (folder / sources.VALIDATION_ARCHIVE).unlink()
    for i in range(number):
        write(folder / 'val' / f'ILSVRC2012_val_{i + 1:08d}.JPEG', encoded(noise(i)))


def wrong_truth(folder):
    (folder / f'{sources.DEVKIT}.tar.gz').unlink()
    write_devkit(folder / sources.DEVKIT, {str(i): 'n01' for i in range(10)})
    (folder / sources.DEVKIT / 'data' / sources.GROUND_TRUTH).write_text('1\n5\n' + '1\n' * 8)  # 5 is the group


BAD = {
    'neither archive nor folder': (no_train, ['neither', sources.TRAIN_ARCHIVE]),
    'a cut training archive': (
        lambda f: cut(f / sources.TRAIN_ARCHIVE, 0.7), [sources.TRAIN_ARCHIVE, 'cut or damaged']),
    'a training archive cut between classes': (cut_after_a_class, [sources.TRAIN_ARCHIVE, 'cut or damaged']),
    'no tar at all': (lambda f: (f / sources.TRAIN_ARCHIVE).write_bytes(b'<html>' * 999), ['cut or damaged']),
    'a cut validation archive': (lambda f: cut(f / sources.VALIDATION_ARCHIVE, 0.5), [sources.VALIDATION_ARCHIVE]),
    'no devkit': (lambda f: (f / f'{sources.DEVKIT}.tar.gz').unlink(), [sources.DEVKIT, 'by number']),
    'a cut devkit': (lambda f: cut(f / f'{sources.DEVKIT}.tar.gz', 0.5), [sources.DEVKIT]),
    'an ID of a group': (wrong_truth, ['image 2', 'ID 5']),
    'a missing validation image': (lambda f: flat_validation(f, 8), ['8 of the 10', 'number 9']),
    'a validation image too many': (lambda f: flat_validation(f, 11), ['00000011', '10']),
    'loose and sorted validation images': (lambda f: (validation_tree(f), loose_validation(f)), ['loose images']),
    'a validation class without training images': (
        lambda f: (validation_tree(f), write(f / 'val' / 'n04' / 'x.JPEG', b'x')), ['n04', 'no training images']),
}


@pytest.mark.parametrize('damage, words', BAD.values(), ids=BAD.keys())
def test_a_bad_source_is_refused_in_one_sentence(tmp_path, damage, words):
    folder = tmp_path / 'src'
    write_archives(folder, tmp_path / 'tree', write_tree(tmp_path / 'tree'))
    shutil.copytree(tmp_path / 'tree' / 'train', folder / 'train')  # the archives are preferred
    damage(folder)
    refused(lambda: packing.pack(str(folder), str(tmp_path / 'out'), workers=1), *words)
    assert not (tmp_path / 'out').exists()


def test_an_empty_class_and_a_class_name_of_two_lines_are_refused(tree, tmp_path):
    (tree / 'train' / 'empty').mkdir()
    refused(lambda: packing.pack(str(tree), str(tmp_path / 'out'), workers=1), 'empty', 'no images')
    (tree / 'train' / 'empty').rename(tree / 'train' / 'two\nlines')
    refused(lambda: packing.pack(str(tree), str(tmp_path / 'out'), workers=1), 'two\\nlines', 'one line')


def test_a_folder_of_other_files_and_settings_out_of_range_are_refused(tree, tmp_path):
    for arguments, words in (({'resize': 0}, ['--resize 0']), ({'quality': 90}, ['--quality 90', '--resize']),
                             ({'resize': 9, 'quality': 101}, ['--quality 101']), ({'seed': -1}, ['--seed -1']),
                             ({'workers': 0}, ['--workers 0'])):
        refused(lambda given=arguments: packing.pack(str(tree), str(tmp_path / 'out'), **given), *words)
    write(tmp_path / 'out' / 'train.rec', b'mine')
    refused(lambda: packing.pack(str(tree), str(tmp_path / 'out'), workers=1), 'train.rec', 'no manifest.json')
    assert (tmp_path / 'out' / 'train.rec').read_bytes() == b'mine'
    refused(lambda: packing.pack(str(tmp_path / 'none'), str(tmp_path / 'new'), workers=1), 'not a folder')


@pytest.mark.parametrize('damage, words', [
    (lambda out: cut(out / 'train.rec', 0.9), ['train.rec', 'bytes']),
    (lambda out: (out / 'val.idx').unlink(), ['val.idx', 'not found']),
    (lambda out: (out / 'train.idx').write_bytes((out / 'train.idx').read_bytes().replace(b'\n3\t', b'\n4\t')),
     ['train.idx']),
    (lambda out: (out / 'classes.txt').write_text('n01\n'), ['classes.txt']),
    (lambda out: (out / 'manifest.json').write_text('{"format": 2}'), ['format 2']),
    (lambda out: cut(out / 'manifest.json', 0.5), ['manifest.json']),
])
def test_a_damaged_set_is_refused_by_its_readers_and_by_verify(tree, tmp_path, damage, words):
    packing.pack(str(tree), str(tmp_path / 'out'), workers=1)
    damage(tmp_path / 'out')
    refused(lambda: packing.verify(str(tmp_path / 'out'), workers=1), *words)


# ------------------------------------------------------------------------------------------------- processes

def test_workers_keep_the_order_and_take_no_more_tasks_than_they_have_room_for():
    taken = []

    def tasks():
        for i in range(500):
            taken.append(i)
            yield i

    with Workers(3, lambda task, slot: task * task) as pool:
        for expected, (result, _) in enumerate(pool.run(tasks())):
            assert result == expected * expected
            assert len(taken) - expected <= 10


def test_a_worker_that_is_killed_is_one_sentence_and_none_outlives_the_first_process():
    with Workers(2, lambda task, slot: os.getpid()) as pool:
        pids = {result for result, _ in pool.run(range(50))}
        os.kill(pids.pop(), signal.SIGKILL)
        refused(lambda: list(pool.run(range(1000))), 'worker process', 'goes on')
    with pytest.raises(ProcessLookupError):
        os.kill(pids.pop(), 0)


def test_killed_with_busy_workers_nothing_stays_locked_and_none_goes_on(tmp_path):
    ours, theirs = os.pipe()  # closed for writing when all have ended

    def work(task, slot):
        os.write(theirs, b'.')
        time.sleep(1)

    def main():
        os.close(ours)
        with open(tmp_path / 'lock', 'w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with Workers(2, work, inherited=[lock]) as pool:
                for _ in pool.run(range(100)):
                    os.kill(os.getpid(), signal.SIGKILL)

    assert in_process(main) == -signal.SIGKILL
    os.close(theirs)
    with open(tmp_path / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    done = b''
    while select.select([ours], [], [], 10)[0]:
        read = os.read(ours, 100)
        if not read:
            break
        done += read
    else:
        pytest.fail('a worker goes on')
    assert len(done) < 10
    os.close(ours)


def test_the_command_packs_verifies_and_leaves_with_2_for_bad_input(tree, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / 'out')
    done = subprocess.run([sys.executable, TOOL, '--src', str(tree), '--out', out, '--resize', '24', '--quality', '80',
                           '--seed', '5', '--workers', '2', '--verify'], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, '')
    assert '20 training and 10 validation images of 4 classes' in done.stdout.splitlines()[-1]
    assert records.read_manifest(out)['quality'] == 80
    for flags in (['--src', str(tree)], []):
        monkeypatch.setattr(sys, 'argv', [TOOL, '--out', out, *flags])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(TOOL, run_name='__main__')
        assert left.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith('error: ') and len(error.splitlines()) == 1
