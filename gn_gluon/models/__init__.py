"""The networks: each takes the norm as an argument, and nothing in it knows which norm that is."""
from gn_gluon.models.cifar_resnet import CifarResNet
from gn_gluon.models.convnet import ConvNet
from gn_gluon.models.count import count_multiply_adds, count_parameters
from gn_gluon.models.resnet import ResNet
from gn_gluon.models.vgg import VGG16

__all__ = ['CifarResNet', 'ConvNet', 'ResNet', 'VGG16', 'count_multiply_adds', 'count_parameters']
