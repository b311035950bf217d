"""Downloads from a local server that cuts, corrupts, stalls, loses files; archives with evil members; full disks."""
import collections
import hashlib
import http.server
import io
import os
import signal
import socketserver
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile

import pytest

from gn_gluon import data
from gn_gluon.data import download as downloads
from gn_gluon.data.download import RemoteFile, Source, download
from gn_gluon.errors import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONTENT = bytes(range(256)) * 4000  # about 1 MB
FILE = 'train-images-idx3-ubyte.gz'


class Handler(http.server.BaseHTTPRequestHandler):
    """/WAY/NAME serves server.files[NAME] the way that WAY says."""

    def do_GET(self):  # noqa: N802 - the library's name
        way, _, name = self.path[1:].partition('/')
        content, start = self.server.files[name], 0
        asked = self.headers.get('Range')
        self.server.requests.append((way, asked))
        turn = sum(request[0] == way for request in self.server.requests)
        if way == 'missing' or (way == 'busy' and turn < 3):
            self.send_error(404 if way == 'missing' else 503)
            return
        if way == 'other':  # a login page that answers 200, as a hotel's network does
            content = b'<html>please log in</html>'
        if way == 'corrupt' or (way == 'corrupt-once' and turn == 1):
            content = content[:1000] + b'!' + content[1001:]
        if way == 'endless':
            content = content + content
        if asked and 'norange' not in way:
            start = int(asked[len('bytes='):-1])
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
        else:
            self.send_response(200)
        if way not in ('endless', 'cut-nolength'):
            self.send_header('Content-Length', str(len(content) - start))
        if name.endswith('.gz') and way == 'marked':
            self.send_header('Content-Encoding', 'gzip')
        self.end_headers()
        end = len(content)
        if way in ('cut', 'cut-nolength'):
            end = min(end, start + 300000)
        elif way in ('cut-norange', 'stall'):
            end = end // 2 if turn == 1 else end
        for position in range(start, end, 20000):
            self.wfile.write(content[position:min(position + 20000, end)])
            if way == 'slow':
                time.sleep(0.02)
        if way == 'stall' and turn == 1:
            self.server.released.wait(20)

    def log_message(self, *args):
        pass


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that hangs up is part of the tests."""


@pytest.fixture
def server():
    server = Server(('127.0.0.1', 0), Handler)
    server.files, server.requests = {FILE: CONTENT}, []
    server.released = threading.Event()
    server.root = f'http://127.0.0.1:{server.server_port}/'
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.02})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(downloads, 'BACKOFF', 0.001)
    monkeypatch.setattr(downloads, 'SOURCES', {})


def offer(server, *ways, name=FILE, content=CONTENT, **kwargs):
    """Make `MNIST` one file that is to be had in these ways, one after another."""
    server.files[name] = content
    checksum = kwargs.pop('checksum', 'sha256:' + hashlib.sha256(content).hexdigest())
    file = RemoteFile(name, [f'{server.root}{way}/{name}' for way in ways], len(content), checksum, **kwargs)
    downloads.SOURCES['MNIST'] = Source('mnist', [file])


def placed(folder, name=FILE):
    """The contents of the one file that must lie in `folder`, whole and under its own name."""
    assert os.listdir(folder / 'mnist') == [name]
    return (folder / 'mnist' / name).read_bytes()


def ranges(server):
    return [asked for _, asked in server.requests]


# ---------------------------------------------------------------------------------------------- one file

def test_a_file_is_placed_and_the_second_time_left_alone(server, tmp_path, capsys):
    offer(server, 'good')
    download(['mnist'], str(tmp_path))
    assert placed(tmp_path) == CONTENT
    assert 'fetched' in capsys.readouterr().out
    download(['MNIST', 'mnist'], str(tmp_path))
    assert capsys.readouterr().out.count('is already there') == 1
    assert len(server.requests) == 1


@pytest.mark.parametrize('way', ['cut', 'cut-nolength'])
def test_a_cut_connection_is_resumed_where_it_broke(server, tmp_path, way):
    offer(server, way)
    download(['MNIST'], str(tmp_path))
    assert placed(tmp_path) == CONTENT
    assert ranges(server) == [None, 'bytes=300000-', 'bytes=600000-', 'bytes=900000-']


def test_a_server_that_ignores_range_is_read_again_from_zero(server, tmp_path):
    offer(server, 'cut-norange')
    download(['MNIST'], str(tmp_path))
    assert placed(tmp_path) == CONTENT
    assert ranges(server) == [None, f'bytes={len(CONTENT) // 2}-']


def test_a_partial_file_of_an_earlier_run_is_resumed(server, tmp_path):
    offer(server, 'good')
    (tmp_path / 'mnist').mkdir()
    (tmp_path / 'mnist' / (FILE + '.part')).write_bytes(CONTENT[:12345])
    download(['MNIST'], str(tmp_path))
    assert placed(tmp_path) == CONTENT
    assert ranges(server) == ['bytes=12345-']


@pytest.mark.parametrize('part', [b'?' * 5000, b'?' * len(CONTENT), b'?' * (len(CONTENT) + 1)])
def test_a_partial_file_of_another_content_restarts_once_from_zero(server, tmp_path, part):
    offer(server, 'good')
    (tmp_path / 'mnist').mkdir()
    (tmp_path / 'mnist' / (FILE + '.part')).write_bytes(part)
    download(['MNIST'], str(tmp_path))
    assert placed(tmp_path) == CONTENT
    assert ranges(server)[-1] is None


def test_a_damaged_file_is_replaced(server, tmp_path, capsys):
    offer(server, 'good')
    (tmp_path / 'mnist').mkdir()
    (tmp_path / 'mnist' / FILE).write_bytes(b'!' + CONTENT[1:])
    download(['MNIST'], str(tmp_path))
    assert placed(tmp_path) == CONTENT
    assert 'is damaged; fetching it again' in capsys.readouterr().out


def test_corrupt_bytes_are_never_placed(server, tmp_path):
    offer(server, 'corrupt')
    with pytest.raises(UserError, match='wrong SHA256 checksum, twice'):
        download(['MNIST'], str(tmp_path))
    assert os.listdir(tmp_path / 'mnist') == []
    assert ranges(server) == [None, None]
    offer(server, 'corrupt-once')
    download(['MNIST'], str(tmp_path))
    assert placed(tmp_path) == CONTENT


@pytest.mark.parametrize('way, requests', [('missing', 1), ('corrupt', 2), ('other', 1), ('endless', 1)])
def test_the_mirror_is_taken_when_the_first_address_fails(server, tmp_path, way, requests):
    offer(server, way, 'good', checksum='md5:' + hashlib.md5(CONTENT).hexdigest())
    download(['MNIST'], str(tmp_path))
    assert placed(tmp_path) == CONTENT
    assert collections.Counter(way for way, _ in server.requests)[way] == requests


def test_a_login_page_does_not_spoil_a_partial_file(server, tmp_path):
    offer(server, 'other')
    (tmp_path / 'mnist').mkdir()
    part = tmp_path / 'mnist' / (FILE + '.part')
    part.write_bytes(CONTENT[:900000])
    with pytest.raises(UserError, match=r'0\.9 of 1\.0 MB are kept'):
        download(['MNIST'], str(tmp_path))
    assert part.read_bytes() == CONTENT[:900000]


def test_a_busy_server_is_asked_again(server, tmp_path):
    offer(server, 'busy')
    download(['MNIST'], str(tmp_path))
    assert placed(tmp_path) == CONTENT
    assert len(server.requests) == 3


def test_a_server_that_stalls_is_left_and_resumed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, 'TIMEOUT', 0.3)
    offer(server, 'stall')
    download(['MNIST'], str(tmp_path))
    assert placed(tmp_path) == CONTENT
    first, second = ranges(server)
    assert first is None and len(CONTENT) // 2 - downloads.CHUNK <= int(second[6:-1]) <= len(CONTENT) // 2


def test_a_slow_server_is_waited_for(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, 'TIMEOUT', 0.5)  # without a byte; all of them take 1 s
    offer(server, 'slow')
    download(['MNIST'], str(tmp_path))
    assert placed(tmp_path) == CONTENT
    assert len(server.requests) == 1


def test_a_gz_file_marked_as_compressed_text_arrives_as_it_is(server, tmp_path):
    offer(server, 'marked')
    download(['MNIST'], str(tmp_path))
    assert placed(tmp_path) == CONTENT


def test_no_address_left_is_one_sentence_and_the_other_data_sets_are_tried(server, tmp_path):
    offer(server, 'missing')
    downloads.SOURCES['SVHN'] = Source('svhn', [RemoteFile(FILE, ['http://127.0.0.1:9/nobody'], 1, 'md5:0')])
    file = downloads.SOURCES['MNIST'].files[0]
    downloads.SOURCES['Fashion'] = Source('fashion', [file._replace(addresses=[f'{server.root}good/{FILE}'])])
    with pytest.raises(UserError) as caught:
        download(['MNIST', 'SVHN', 'FashionMNIST'], str(tmp_path))
    assert 'missing/' + FILE + ': HTTP 404' in str(caught.value)
    assert 'nobody: no connection' in str(caught.value)
    assert (tmp_path / 'fashion' / FILE).read_bytes() == CONTENT


# ---------------------------------------------------------------------------------------------- archives

def tar_of(**members):
    """A .tar.gz of {name: bytes, or a TarInfo without contents}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as tar:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            info.size = len(content) if isinstance(content, bytes) else 0
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return buffer.getvalue()


def zip_of(**members):
    """A .zip of {name: bytes, or (mode, bytes)}."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name, content in members.items():
            mode, content = content if isinstance(content, tuple) else (stat.S_IFREG | 0o644, content)
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, content)
    return buffer.getvalue()


def special(kind, target=''):
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


GOOD = {'top/': special(tarfile.DIRTYPE), 'top/one': b'1' * 9, 'top/deep/two': b'2'}


def offer_archive(server, content, *ways):
    offer(server, *(ways or ['good']), name='archive', content=content, unpacks_to='top')


def tree(folder):
    return sorted(os.path.relpath(os.path.join(where, name), folder)
                  for where, _, names in os.walk(folder) for name in names)


@pytest.mark.parametrize('content', [
    tar_of(**GOOD), zip_of(**{'top/': (stat.S_IFDIR | 0o755, b''), 'top/one': b'1' * 9, 'top/deep/two': b'2'})])
def test_an_archive_is_unpacked_whole_checked_the_next_time_and_mended(server, tmp_path, capsys, content):
    offer_archive(server, content, 'cut')
    download(['MNIST'], str(tmp_path))
    top = tmp_path / 'mnist' / 'top'
    assert tree(tmp_path) == ['mnist/top/SHA256SUMS', 'mnist/top/deep/two', 'mnist/top/one']
    assert (top / 'one').read_bytes() == b'1' * 9
    download(['MNIST'], str(tmp_path))
    assert 'is already there' in capsys.readouterr().out
    assert len(server.requests) == 1
    (top / 'deep' / 'two').write_bytes(b'3')
    download(['MNIST'], str(tmp_path))
    assert 'deep/two is damaged; fetching it again' in capsys.readouterr().out
    assert (top / 'deep' / 'two').read_bytes() == b'2'
    (top / 'one').unlink()
    download(['MNIST'], str(tmp_path))
    assert tree(tmp_path) == ['mnist/top/SHA256SUMS', 'mnist/top/deep/two', 'mnist/top/one']


def test_a_folder_that_this_command_did_not_make_is_left_alone(server, tmp_path, capsys):
    offer_archive(server, tar_of(**GOOD))
    mine = tmp_path / 'mnist' / 'top' / 'one'
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b'mine')
    download(['MNIST'], str(tmp_path))
    assert 'left as it is' in capsys.readouterr().out
    assert tree(tmp_path) == ['mnist/top/one'] and mine.read_bytes() == b'mine'


def test_an_archive_placed_by_hand_is_unpacked_and_kept(server, tmp_path):
    offer_archive(server, tar_of(**GOOD))
    (tmp_path / 'mnist').mkdir()
    (tmp_path / 'mnist' / 'archive').write_bytes(tar_of(**GOOD))
    download(['MNIST'], str(tmp_path))
    assert not server.requests
    assert tree(tmp_path) == ['mnist/archive', 'mnist/top/SHA256SUMS', 'mnist/top/deep/two', 'mnist/top/one']


@pytest.mark.parametrize('content', [
    tar_of(**GOOD, **{'../evil': b'x'}),
    tar_of(**GOOD, **{'top/../../../evil': b'x'}),
    tar_of(**GOOD, **{'/tmp/gn_gluon_evil': b'x'}),
    tar_of(**GOOD, **{'top/link': special(tarfile.SYMTYPE, '/etc'), 'top/link/evil': b'x'}),
    tar_of(**GOOD, **{'top/link': special(tarfile.LNKTYPE, '/etc/passwd')}),
    tar_of(**GOOD, **{'top/device': special(tarfile.CHRTYPE)}),
    tar_of(**GOOD, **{'top/pipe': special(tarfile.FIFOTYPE)}),
    zip_of(**{'top/one': b'1', '../evil': b'x'}),
    zip_of(**{'top/one': b'1', '/tmp/gn_gluon_evil': b'x'}),
    zip_of(**{'top/one': b'1', 'top/..\\evil': b'x'}),
    zip_of(**{'top/one': b'1', 'top/link': (stat.S_IFLNK | 0o777, b'/etc/passwd')}),
    zip_of(**{'top/one': b'1', 'top/link/': (stat.S_IFLNK | 0o777, b'/etc')}),
])
def test_an_evil_member_is_named_and_nothing_is_left(server, tmp_path, content):
    offer_archive(server, content)
    with pytest.raises(UserError, match='its member .* is not a plain file below its folder'):
        download(['MNIST'], str(tmp_path / 'out'))
    assert tree(tmp_path) == ['out/mnist/archive.part']
    assert not os.path.exists('/tmp/gn_gluon_evil')


def test_an_archive_that_is_none_or_lacks_its_folder_is_refused(server, tmp_path):
    for content, words in ((b'neither tar nor zip', 'cannot be unpacked'),
                           (tar_of(**{'other/one': b'1'}), 'holds no folder top')):
        offer_archive(server, content)
        with pytest.raises(UserError, match=words):
            download(['MNIST'], str(tmp_path))


# ------------------------------------------------------------------------------------------------- disks

def test_too_little_space_is_said_before_anything_is_fetched(server, tmp_path, monkeypatch):
    offer(server, 'good', unpacked_size=5 * 10 ** 6)
    monkeypatch.setattr(downloads.shutil, 'disk_usage', lambda folder: collections.namedtuple('usage', 'free')(10 ** 6))
    with pytest.raises(UserError, match='has 1 MB free, but .* needs 6 MB'):
        download(['MNIST'], str(tmp_path))
    assert not server.requests


def test_a_folder_that_cannot_be_made_is_one_sentence(server, tmp_path):
    offer(server, 'good')
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'file/mnist: Not a directory; .*--out'):
        download(['MNIST'], str(tmp_path / 'file'))


# ------------------------------------------------------------------------------------- the real command

def start_command(server, way, arguments, before=''):
    """tools/download.py in a process of its own, with MNIST to be had from the local server."""
    code = '\n'.join([
        'import runpy, sys', 'import gn_gluon.data.download as downloads', before,
        'downloads.SOURCES["MNIST"] = downloads.Source("mnist", [downloads.RemoteFile('
        f'{FILE!r}, [{server.root + way + "/" + FILE!r}], {len(CONTENT)}, '
        f'"sha256:{hashlib.sha256(CONTENT).hexdigest()}")])',
        f'sys.argv = {["tools/download.py", *arguments]!r}',
        'runpy.run_path("tools/download.py", run_name="__main__")'])
    return subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            universal_newlines=True)


def test_ctrl_c_leaves_with_130_and_the_same_command_goes_on(server, tmp_path):
    arguments = ['--dataset', 'mnist', '--out', str(tmp_path)]
    process = start_command(server, 'stall', arguments)
    part = tmp_path / 'mnist' / (FILE + '.part')
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert 'kept' in errors and 'Traceback' not in errors
    kept = part.stat().st_size
    assert 0 < kept < len(CONTENT)
    again = start_command(server, 'good', arguments)
    output, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert placed(tmp_path) == CONTENT
    assert server.requests[-1] == ('good', f'bytes={kept}-')
    assert f'{tmp_path}/mnist/{FILE} fetched' in output


@pytest.mark.parametrize('arguments, before, words', [
    (['--dataset', 'MNIST', 'CIFAR11'], '', "'CIFAR11' is not a data set that can be fetched; there are MNIST, Fas"),
    (['--dataset', 'MNIST'], 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))',
     'File too large; free some space'),
])
def test_bad_input_and_a_full_disk_leave_with_2_and_one_sentence(server, tmp_path, arguments, before, words):
    process = start_command(server, 'good', [*arguments, '--out', str(tmp_path)], before)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.count('\n') == 1 and errors.startswith('error: ') and words in errors, errors


# -------------------------------------------------------------------------------------- the real sources

def test_the_real_sources_lie_where_the_readers_look(monkeypatch):
    monkeypatch.undo()
    sources = downloads.SOURCES
    for reader in (data.MNIST, data.FashionMNIST, data.SVHN, data.CIFAR10, data.TinyImageNet):
        assert sources[reader.download_name].folder == reader.name
    files = [file for source in sources.values() for file in source.files]
    assert len(files) == 13
    for file in files:
        method, _, checksum = file.checksum.partition(':')
        assert len(checksum) == 2 * hashlib.new(method).digest_size
        assert len(set(file.addresses)) >= 2 and all(address.endswith('/' + file.name) for address in file.addresses)


def test_the_published_checksums_are_those_of_the_real_files(tmp_path, monkeypatch):
    monkeypatch.undo()
    archives = os.path.join(ROOT, '..', 'shared', 'data')
    if not os.path.exists(archives):
        pytest.skip('the packed real data sets are not in ../shared/data')
    for name, archive in (('MNIST', 'mnist.tar'), ('Fashion', 'fashion-mnist.tar')):
        with tarfile.open(os.path.join(archives, archive)) as tar:
            members = {os.path.basename(member.name): member for member in tar if member.isreg()}
            for file in downloads.SOURCES[name].files:
                content = tar.extractfile(members[file.name]).read()
                assert len(content) == file.size
                assert 'sha256:' + hashlib.sha256(content).hexdigest() == file.checksum
