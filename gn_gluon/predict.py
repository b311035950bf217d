"""python -m gn_gluon.predict IMAGE... --workdir RUN: the five likeliest classes of image files."""
import argparse
import os

from gn_gluon.errors import UserError, command


def predict(paths, workdir, checkpoint='best'):
    """Classify image files with a trained run.

    Arguments:
        paths: image files that OpenCV reads.
        workdir: the run folder.
        checkpoint: as of experiment.load_weights.
    Returns one list per image of (class name, probability in percent), the likeliest first, at most five.
    """
    import cv2
    import mxnet as mx
    import numpy as np

    from gn_gluon import experiment
    recorded, description = os.path.join(workdir, 'config.gin'), os.path.join(workdir, 'dataset.json')
    if not (os.path.exists(recorded) and os.path.exists(description)):
        raise UserError(f'no run in {workdir} (config.gin and dataset.json are expected there); train one first')
    made, _ = experiment.recorded_experiment(workdir)
    built = experiment.trained(made, workdir, checkpoint)
    names = built.dataset.class_names or [f'class {i}' for i in range(built.dataset.num_classes)]
    answers = []
    for path in paths:
        image = cv2.imread(path, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            raise UserError('{} {}'.format(path, 'is not an image that OpenCV reads' if os.path.exists(path)
                                           else 'not found'))
        batch = mx.nd.array(built.dataset.preprocess(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))[None])
        percent = 100 * mx.nd.softmax(built.net(batch))[0].asnumpy()
        answers.append([(names[i], float(percent[i])) for i in np.argsort(-percent, kind='stable')[:5]])
    return answers


def main():
    """The command line."""
    parser = argparse.ArgumentParser(prog='python -m gn_gluon.predict', description=__doc__)
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image file, e.g. cat.jpg')
    parser.add_argument('--workdir', required=True, help='run folder, e.g. runs/cifar_gn')
    parser.add_argument('--checkpoint', default='best',
                        help='last, best, or the path of a checkpoint folder or a .params file (default: %(default)s)')
    flags = parser.parse_args()
    for path, answer in zip(flags.images, predict(flags.images, flags.workdir, flags.checkpoint)):
        print('{}: {}'.format(path, ', '.join('{} {:.1f} %'.format(*choice) for choice in answer)))


if __name__ == '__main__':
    command(main)
