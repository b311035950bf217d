#!/bin/bash
# Shows that the GPU flavour installs, imports and trains on the CPU where there is neither GPU nor driver:
#     tools/check_cu112.sh [PYTHON]
# Makes a virtual environment with '.[cu112]' (a download of 2.3 GB, 6 GB on disk, removed at the end) and a
# stand-in for the driver's library. Needs gcc. PYTHON (default python3) must be 3.8 to 3.12.
set -euo pipefail

clone=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset LD_LIBRARY_PATH

"${1:-python3}" -m venv "$work/venv"
python=$work/venv/bin/python
(cd "$clone" && "$python" -m pip install --quiet --no-cache-dir '.[cu112]')
mkdir "$work/driver"
gcc -shared -fPIC -o "$work/driver/libcuda.so.1" "$clone/tests/libcuda_stub.c"
cd "$work"

echo '== with the stand-in for the driver'
LD_LIBRARY_PATH=$work/driver "$python" -m gn_gluon.info
LD_LIBRARY_PATH=$work/driver "$python" - <<'PYTHON'
from gn_gluon import GroupNorm  # before mxnet: it loads the CUDA libraries

import mxnet as mx

net = mx.gluon.nn.HybridSequential()
net.add(mx.gluon.nn.Conv2D(32, 3, in_channels=3), GroupNorm(8, in_channels=32, activation='relu'),
        mx.gluon.nn.Dense(10))
net.initialize()
net.hybridize(static_alloc=True, static_shape=True)
trainer = mx.gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.01})
images, labels = mx.nd.random.normal(shape=(4, 3, 8, 8)), mx.nd.array([0, 1, 2, 3])
losses = []
for _ in range(5):
    with mx.autograd.record():
        loss = mx.gluon.loss.SoftmaxCrossEntropyLoss()(net(images), labels)
    loss.backward()
    trainer.step(4)
    losses.append(loss.mean().asscalar())
assert losses[-1] < losses[0], losses
print('{} GPUs; loss over 5 steps on the CPU: {}'.format(
    mx.context.num_gpus(), ' '.join('{:.4f}'.format(loss) for loss in losses)))
PYTHON

say_why() {  # the import must fail, with one line on stderr and exit code 2
    code=0
    "$@" 2> stderr.txt || code=$?
    cat stderr.txt
    [ "$code" = 2 ] && [ "$(wc -l < stderr.txt)" = 1 ]
}
echo '== without a driver'
say_why "$python" -m gn_gluon.info
echo '== without one of the CUDA libraries'
"$python" -m pip uninstall --quiet -y nvidia-nvtx-cu11
LD_LIBRARY_PATH=$work/driver say_why "$python" -m gn_gluon.info
echo 'check_cu112: all as expected'
