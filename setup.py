"""Installs gn_gluon: `pip install '.[cpu]'` or, for NVIDIA GPUs, `pip install '.[cu112]'`."""
import atexit
import re
import shutil
import sys
import tempfile
from pathlib import Path

if sys.version_info >= (3, 13):
    sys.exit(f'This is Python {sys.version_info[0]}.{sys.version_info[1]}, but MXNet needs Python 3.8 to '
             '3.12; get one with: uv venv --python 3.12')

from setuptools import find_packages, setup  # noqa: E402 - a bare Python 3.13 has none

# Not in the clone: what an older build left behind there would be installed again with the next.
build_folder = tempfile.mkdtemp(prefix='gn_gluon-build-')
atexit.register(shutil.rmtree, build_folder, ignore_errors=True)

setup(
    name='gn_gluon',
    version=re.search(r"__version__ = '(.+)'", Path('gn_gluon/__init__.py').read_text()).group(1),
    description='Group Normalization for MXNet Gluon, and the experiments of its paper',
    license='Apache-2.0',
    author='The gn_gluon authors',
    python_requires='>=3.8,<3.13',
    packages=find_packages(include=['gn_gluon', 'gn_gluon.*']) + ['gn_gluon.recipes'],
    package_dir={'gn_gluon.recipes': 'gin'},
    package_data={'gn_gluon': ['templates/*'], 'gn_gluon.recipes': ['*.gin'], 'gn_gluon.norm': ['native/*']},
    options={'build': {'build_base': build_folder}, 'egg_info': {'egg_base': build_folder}},
    # Bounded by the next, untested major version: gluoncv, of 2022, asks for any pandas, Pillow and scipy.
    install_requires=[
        'absl-py',
        'gin-config>=0.5,<0.6',
        'gluoncv>=0.10.5,<0.11',
        'h5py<4',
        'jinja2>=3,<4',
        'matplotlib>=3.7,<4',  # legends outside of the axes
        'numpy<2',  # MXNet 1.9.1 uses names that numpy 2 lacks
        'opencv-python<4.12',  # 4.12 needs numpy 2; not the -headless twin, since gluoncv requires this one
        'pandas<4',
        'Pillow<14',
        'safetensors<1',  # weights of other frameworks
        'scikit-learn<2',  # the handwritten digits
        'scipy<2',
        'setuptools<85; python_version >= "3.12"',  # the distutils that MXNet imports
        'tensorboardX<3',
        'tqdm<5',
    ],
    extras_require={
        'cpu': ['mxnet==1.9.1'],
        'cu112': [
            'mxnet-cu112==1.9.1',
            'nvidia-cublas-cu11==11.11.3.6',
            'nvidia-cuda-nvrtc-cu11==11.8.89',
            'nvidia-cuda-runtime-cu11==11.8.89',
            'nvidia-cudnn-cu11==8.9.6.50',  # MXNet 1.9.1 was built for cuDNN 8
            'nvidia-cufft-cu11==10.9.0.58',
            'nvidia-curand-cu11==10.3.0.86',
            'nvidia-cusolver-cu11==11.4.1.48',
            'nvidia-nccl-cu11==2.21.5',
            'nvidia-nvtx-cu11==11.8.86',
        ],
        'export': ['onnx<2'],
        # NVRTC shows without a GPU that the CUDA kernels compile.
        'test': ['onnx<2', 'onnxruntime<2', 'pytest', 'ruff',
                 'nvidia-cuda-nvrtc-cu11==11.8.89; platform_machine == "x86_64"'],
    },
)
