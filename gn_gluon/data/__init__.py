"""Data sets: how one sample becomes an image, and the order in which samples are seen."""
from gn_gluon.data.cifar import CIFAR10
from gn_gluon.data.digits import Digits
from gn_gluon.data.h5 import H5Dataset
from gn_gluon.data.imagenet import ImageNet
from gn_gluon.data.mnist import MNIST, FashionMNIST
from gn_gluon.data.svhn import SVHN
from gn_gluon.data.synthetic import Synthetic
from gn_gluon.data.tiny_imagenet import TinyImageNet

__all__ = ['CIFAR10', 'Digits', 'FashionMNIST', 'H5Dataset', 'ImageNet', 'MNIST', 'SVHN', 'Synthetic', 'TinyImageNet']
