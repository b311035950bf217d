"""The norm layers: `layers.py` is what a network calls, `composed.py` the arithmetic in stock MXNet operators."""
from gn_gluon.norm.layers import BatchNorm, BatchRenorm, GroupNorm, InstanceNorm, LayerNorm, NoNorm

__all__ = ['BatchNorm', 'BatchRenorm', 'GroupNorm', 'InstanceNorm', 'LayerNorm', 'NoNorm']
