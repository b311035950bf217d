"""The paper's results as data (Wu & He, "Group Normalization", arXiv 1803.08494): what our own figures stand beside.

A figure that nobody could be found to have read in the paper's text is marked as not verified wherever it is shown.
"""
from collections import namedtuple

#: A figure of the paper. `table`: where it stands there; `row`, `column`: its place in that table; `run`: the gin file
#: whose run would give ours, None where this project has no runner for it; `value`: the paper's; `verified`: False
#: where it was written from memory.
Cell = namedtuple('Cell', 'table row column run value verified')

#: What the figures of a table are, by its name.
UNITS = {
    'Table 1': 'ResNet-50 on ImageNet, 8 GPUs x 32 images: top-1 validation error [%]',
    'Table 2': 'ResNet-50 on ImageNet, 8 GPUs x b images: top-1 validation error [%]',
    'Sec. 4.1': 'ResNet-50 with BR (r_max 1.5, d_max 0.5), 8 GPUs x 4 images: top-1 validation error [%]',
    'Table 3, groups': 'ResNet-50 with GN of G groups, 8 GPUs x 32 images: top-1 validation error [%]',
    'Table 3, channels': 'ResNet-50, GN with C / G channels per group, 8 GPUs x 32 images: top-1 validation error [%]',
    'ResNet-101': 'ResNet-101 on ImageNet, 8 GPUs x b images: top-1 validation error [%]',
    'VGG-16': 'VGG-16 on ImageNet, 8 GPUs x 32 images: top-1 validation error [%]',
    'Table 4': 'Mask R-CNN on COCO, ResNet-50 C4: AP, AP50, AP75 [%]',
    'Table 5': 'Mask R-CNN on COCO, ResNet-50 FPN, box head of 4 convolutions and a dense layer: AP, AP50, AP75 [%]',
    'Table 6': 'Mask R-CNN on COCO, FPN: AP [%]',
    'Table 7': 'Mask R-CNN on COCO from scratch, 270k updates: AP, AP50, AP75 [%]',
    'Kinetics': 'I3D ResNet-50 on Kinetics-400: accuracy [%]',
}

#: Top-1 validation errors of Figure 1, {norm: {images per GPU: percent}}.
FIGURE_1 = {'BN': {32: 23.6, 16: 23.7, 8: 24.8, 4: 27.3, 2: 34.7},
            'GN': {32: 24.1, 16: 24.2, 8: 24.0, 4: 24.2, 2: 24.1}}


def _cells():
    for norm, value in (('BN', 23.6), ('LN', 25.3), ('IN', 28.4), ('GN', 24.1)):
        yield Cell('Table 1', norm, 'b = 32', f'resnet50_{norm.lower()}_bs32', value, True)
    for norm, values in FIGURE_1.items():
        for batch, value in values.items():
            yield Cell('Table 2', norm, f'b = {batch}', f'resnet50_{norm.lower()}_bs{batch}', value, True)
    yield Cell('Sec. 4.1', 'BR', 'b = 4', 'resnet50_br_bs4', 26.3, True)
    for groups, value in ((64, 24.6), (32, 24.1), (16, 24.6), (8, 24.4), (4, 24.6), (2, 24.7), (1, 25.3)):
        run = {32: 'resnet50_gn_bs32', 1: 'resnet50_ln_bs32'}.get(groups, f'resnet50_gn_g{groups}')
        yield Cell('Table 3, groups', 'GN', f'G = {groups}', run, value, True)
    for channels, value in ((64, 24.4), (32, 24.5), (16, 24.2), (8, 24.3), (4, 24.8), (2, 25.6), (1, 28.4)):
        run = 'resnet50_in_bs32' if channels == 1 else f'resnet50_gn_cpg{channels}'
        yield Cell('Table 3, channels', 'GN', f'C / G = {channels}', run, value, channels != 4)
    for norm, values in (('BN', {32: 22.0, 2: 31.9}), ('GN', {32: 22.4, 2: 23.0})):
        for batch, value in values.items():
            yield Cell('ResNet-101', norm, f'b = {batch}', f'resnet101_{norm.lower()}_bs{batch}', value, True)
    for norm, run, value in (('no norm', 'none', 29.2), ('BN', 'bn', 28.0), ('GN', 'gn', 27.6)):
        yield Cell('VGG-16', norm, 'b = 32', f'vgg16_{run}', value, norm != 'no norm')
    for table, row, *values in _OTHERS:
        for column, value in zip(_COLUMNS[table], values):
            yield Cell(table, row, column, None, value, True)


_BOX_AND_MASK = ('box AP', 'AP50', 'AP75', 'mask AP', 'mask AP50', 'mask AP75')
_COLUMNS = {'Table 4': _BOX_AND_MASK, 'Table 5': _BOX_AND_MASK, 'Table 6': ('box AP', 'mask AP'),
            'Table 7': _BOX_AND_MASK, 'Kinetics': ('top-1', 'top-5')}
_OTHERS = [  # BN*: frozen BN
    ('Table 4', 'BN*', 37.7, 57.9, 40.9, 32.8, 54.3, 34.7),
    ('Table 4', 'GN', 38.8, 59.2, 42.2, 33.6, 55.9, 35.4),
    ('Table 5', 'BN*, no norm in the head', 38.6, 59.5, 41.9, 34.2, 56.2, 36.1),
    ('Table 5', 'BN*, GN in the head', 39.5, 60.0, 43.2, 34.4, 56.4, 36.3),
    ('Table 5', 'GN, GN in the head', 40.0, 61.0, 43.3, 34.8, 57.3, 36.3),
    ('Table 6', 'R50 BN*', 38.6, 34.5),
    ('Table 6', 'R50 GN', 40.3, 35.7),
    ('Table 6', 'R50 GN, long', 40.8, 36.1),
    ('Table 6', 'R101 BN*', 40.9, 36.4),
    ('Table 6', 'R101 GN', 41.8, 36.8),
    ('Table 6', 'R101 GN, long', 42.3, 37.2),
    ('Table 7', 'R50 GN', 39.5, 59.8, 43.6, 35.2, 56.9, 37.6),
    ('Table 7', 'R101 GN', 41.0, 61.1, 44.9, 36.4, 58.2, 38.7),
    ('Kinetics', '32 frames, 8 clips per GPU, BN', 73.3, 90.7),
    ('Kinetics', '32 frames, 8 clips per GPU, GN', 73.0, 90.6),
    ('Kinetics', '32 frames, 4 clips per GPU, BN', 72.1, 90.0),
    ('Kinetics', '32 frames, 4 clips per GPU, GN', 72.8, 90.6),
    ('Kinetics', '64 frames, 4 clips per GPU, BN', 73.3, 90.8),
    ('Kinetics', '64 frames, 4 clips per GPU, GN', 74.5, 91.7),
]

#: Every figure of the paper that this project knows, in the order of UNITS.
CELLS = tuple(_cells())
