"""Every command of the README is run, in its order and as it stands, in a copy of the clone; flags make it short."""
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from test_convert import RESNET50, detectron, random_weights, write_pkl

CLONE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(CLONE, '..', 'shared', 'data')

#: What a test cannot do to the machine that it runs on, and where it is done instead.
ELSEWHERE = {
    'python3 -m venv': '.ci/run', '. .venv/bin/activate': '.ci/run', 'pip install': '.ci/run, tools/check_cu112.sh',
    'pytest': '.ci/run', 'apt install': 'needs root', 'tensorboard': 'a package of its own',
    'python tools/download.py': 'tests/test_download.py, from a server of its own'}
#: What is appended to a command that begins so: argparse and gin take the last of two.
SHORTER = {
    'python -m gn_gluon.train --gin_file gin/digits': [
        'train.num_epochs = 1', "percentiles.layer = 'features.3'"],  # which the README has a figure made of
    'python -m gn_gluon.train --gin_file gin/cifar': ['train.num_epochs = 1', 'CIFAR10.num_train = 256'],
    'python -m gn_gluon.train --gin_file gin/resnet50': ['train.num_epochs = 1', 'ImageNet.image_size = 64'],
    'python -m gn_gluon.eval --gin_file gin/resnet50': ['ImageNet.image_size = 64'],
    'python tools/launch.py': ['train.num_epochs = 1'],
    'python tools/sweep.py': ['train.num_epochs = 1']}
FLAGS = {
    'python tools/sweep.py': ['--seeds', '1'],
    'python tools/bench_norm.py': ['--rounds', '1', '--network', 'cifar_resnet20', '--batch', '2', '--only', 'native']}


def commands():
    """Those in sh blocks and in backticks, one for each side of a `&&`."""
    with open(os.path.join(CLONE, 'README.md')) as file:
        text = file.read()
    starts = ('python ', 'python3 ', 'pip ', 'pytest', 'apt ', 'tensorboard ')
    found = []
    for language, block, inline in re.findall(r'```(\w*)\n(.*?)```|`([^`]+)`', text, re.S):
        if language == 'sh':
            found += [part for line in block.splitlines() for part in line.split(' && ')]
        elif inline.startswith(starts):
            found.append(' '.join(inline.split()))
    return list(dict.fromkeys(found))


def beginning(command, table, default):
    return next((value for start, value in table.items() if command.startswith(start)), default)


@pytest.fixture
def clone(tmp_path):
    """A copy of the clone with the data that a user of the README has."""
    if not os.path.exists(os.path.join(SHARED, 'unpack.py')):
        pytest.skip('real images (../shared/data) are not here')
    folder = tmp_path / 'clone'
    for name in ('gn_gluon', 'gin', 'tools'):
        shutil.copytree(os.path.join(CLONE, name), folder / name)
    for name, path in (('cifar10', folder / 'datasets' / 'cifar10'), ('imagenet-sample', tmp_path / 'images')):
        subprocess.run([sys.executable, os.path.join(SHARED, 'unpack.py'), name, path], check=True)
    for synset in sorted(os.listdir(tmp_path / 'images' / 'train'))[:32]:
        for split in ('train', 'val'):
            shutil.copytree(tmp_path / 'images' / 'train' / synset, folder / 'ILSVRC2012' / split / synset)
    image = next((folder / 'ILSVRC2012').glob('train/*/*'))
    shutil.copy(image, folder / 'cat.jpg')
    write_pkl(folder / 'R-50-GN.pkl', random_weights(detectron, (*RESNET50[:2], 32)))
    return folder


@pytest.mark.slow
def test_every_command_runs(clone):
    environment = dict(os.environ, PYTHONPATH=str(clone),
                       PATH=os.path.dirname(sys.executable) + os.pathsep + os.environ['PATH'])
    ran = []
    for command in commands():
        if beginning(command, ELSEWHERE, None):
            continue
        words = [sys.executable, *shlex.split(command)[1:], *beginning(command, FLAGS, [])]
        for binding in beginning(command, SHORTER, []):
            words += ['--gin_bindings', binding]
        result = subprocess.run(words, cwd=clone, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f'{command}\n{result.stdout}{result.stderr}'
        ran.append(command)
    assert len(ran) > 15
    for used in ('tools/pack_imagenet.py', 'gn_gluon.train --gin_file gin/resnet50_gn_bs2.gin',
                 'gn_gluon.eval --gin_file gin/cifar_bn.gin'):
        assert any(used in command for command in ran), used
