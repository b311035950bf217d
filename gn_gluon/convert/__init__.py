"""Weights of ResNets published elsewhere become ours, and ours are named as theirs."""
from gn_gluon.convert.formats import FORMATS, convert
from gn_gluon.convert.names import to_torchvision

__all__ = ['FORMATS', 'convert', 'to_torchvision']
