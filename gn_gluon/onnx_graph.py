"""A traced network as an ONNX model: node by node, each MXNet operator as the ONNX operator that computes the same."""
import ast
import json

import mxnet as mx
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gn_gluon import __version__
from gn_gluon.errors import UserError

INPUT, OUTPUT = 'data', 'logits'

_ACTIVATIONS = {'relu': 'Relu', 'sigmoid': 'Sigmoid', 'softrelu': 'Softplus', 'softsign': 'Softsign', 'tanh': 'Tanh'}


def onnx_model(symbol, parameters, image_shape, opset, metadata):
    """The ONNX model of a network, checked, with all shapes inferred.

    Arguments:
        symbol: the network, its GroupNorms one node each (norm.exported.one_node).
        parameters: dict from the symbol's names for them to float32 NDArrays.
        image_shape: (C, H, W).
        opset: 21, the first whose GroupNormalization has its scale and bias per channel, or 18, where
            InstanceNormalization, a multiplication and an addition stand for it.
        metadata: dict of str, for the model's metadata_props.
    Its input `data` is (N, C, H, W), its output `logits` (N, num_classes), both float32, N any number. Raises UserError
    naming an operator that has no translation.
    """
    graph = _Graph(symbol, parameters, opset)
    graph.translate()
    opset_id = helper.make_opsetid('', opset)
    model = helper.make_model(
        helper.make_graph(
            graph.nodes, 'gn_gluon',
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ['N', *image_shape])],
            [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ['N', None])],
            [numpy_helper.from_array(array, name) for name, array in graph.initializers.items()]),
        opset_imports=[opset_id], producer_name='gn_gluon', producer_version=__version__,
        ir_version=helper.find_min_ir_version_for([opset_id]))  # for the sake of older runtimes
    helper.set_model_props(model, metadata)
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    onnx.checker.check_model(model)
    return model


class _Graph:
    """What depends on the symbol's input becomes `nodes`; what they need beside it is computed: `initializers`."""

    def __init__(self, symbol, parameters, opset):
        self.source, self.parameters, self.opset = json.loads(symbol.tojson()), parameters, opset
        self.nodes, self.initializers = [], {}

    def translate(self):
        values = {}  # the names of what depends on the input, by the number of its node
        for number, node in enumerate(self.source['nodes']):
            name, sources = node['name'], [source for source, *_ in node['inputs']]
            if name == INPUT:
                values[number] = INPUT
            elif node['op'] == 'Dropout' and sources[0] in values:
                values[number] = values[sources[0]]
            elif any(source in values for source in sources):
                values[number] = OUTPUT if number == self.source['heads'][0][0] else name
                inputs = [values[source] if source in values else self.constant(source) for source in sources]
                attributes = {key: _literal(value) for key, value in node.get('attrs', {}).items()}
                _translation(node['op'], attributes)(self, name, inputs, values[number], attributes)

    def constant(self, number):
        """Make what node `number` gives, a parameter or computed of them, an initializer; returns its name."""
        name = self.source['nodes'][number]['name']
        if name not in self.initializers:
            self.initializers[name] = self.computed(number).asnumpy()
        return name

    def computed(self, number):
        """The NDArray that node `number` gives."""
        node = self.source['nodes'][number]
        if node['op'] == 'null':
            return self.parameters[node['name']]
        operators = mx.nd._internal if node['op'].startswith('_') else mx.nd.op
        inputs = [self.computed(source) for source, *_ in node['inputs']]
        return getattr(operators, node['op'])(*inputs, **node.get('attrs', {}))

    def node(self, op, name, inputs, output, **attributes):
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))


def _literal(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _convolution(graph, name, inputs, output, attributes):
    graph.node('Conv', name, inputs, output, kernel_shape=attributes['kernel'], strides=attributes['stride'],
               pads=2 * attributes.get('pad', (0, 0)), dilations=attributes.get('dilate', (1, 1)),
               group=attributes.get('num_group', 1))


def _group_norm(graph, name, inputs, output, attributes):
    x, gamma, beta = inputs
    groups, epsilon = attributes['num_groups'], attributes['eps']
    if graph.opset >= 21:
        graph.node('GroupNormalization', name, inputs, output, num_groups=groups, epsilon=epsilon)
        return
    # Before opset 21 GroupNormalization has its scale and bias per group, and onnx.checker calls it deprecated. So the
    # groups are the channels of an InstanceNormalization, and gamma and beta follow.
    ones, zeros, view_shape, view, normalized, shape, restored, scaled = (
        f'{name}_{what}'
        for what in ('ones', 'zeros', 'view_shape', 'view', 'normalized', 'shape', 'restored', 'scaled'))
    graph.initializers[view_shape] = np.array([0, groups, -1])
    graph.initializers[ones], graph.initializers[zeros] = np.ones(groups, np.float32), np.zeros(groups, np.float32)
    for parameter in (gamma, beta):
        graph.initializers[parameter] = graph.initializers[parameter].reshape(-1, 1, 1)
    graph.node('Reshape', view, [x, view_shape], view)
    graph.node('InstanceNormalization', normalized, [view, ones, zeros], normalized, epsilon=epsilon)
    graph.node('Shape', shape, [x], shape)
    graph.node('Reshape', restored, [normalized, shape], restored)
    graph.node('Mul', scaled, [restored, gamma], scaled)
    graph.node('Add', name, [scaled, beta], output)


def _batch_norm(graph, name, inputs, output, attributes):
    graph.node('BatchNormalization', name, inputs, output, epsilon=attributes['eps'])


def _max_pooling(graph, name, inputs, output, attributes):
    graph.node('MaxPool', name, inputs, output, kernel_shape=attributes['kernel'], strides=attributes['stride'],
               pads=2 * attributes['pad'], ceil_mode=int(attributes['pooling_convention'] == 'full'))


def _slice(graph, name, inputs, output, attributes):
    starts, ends = f'{name}_starts', f'{name}_ends'
    graph.initializers[starts] = np.array([0 if begin is None else begin for begin in attributes['begin']])
    graph.initializers[ends] = np.array([np.iinfo('int64').max if end is None else end for end in attributes['end']])
    graph.node('Slice', name, inputs + [starts, ends], output)


def _dense(graph, name, inputs, output, attributes):
    graph.node('Gemm', name, inputs, output, transB=1)


def _activation(graph, name, inputs, output, attributes):
    graph.node(_ACTIVATIONS[attributes['act_type']], name, inputs, output)


def _simply(op):
    """The translation of an operator whose attributes do not matter."""
    return lambda graph, name, inputs, output, attributes: graph.node(op, name, inputs, output)


#: MXNet's operator -> its translation, and the attributes without which that would be wrong.
_TRANSLATIONS = {
    'Convolution': (_convolution, {}),
    'GroupNorm': (_group_norm, {}),
    'BatchNorm': (_batch_norm, {'fix_gamma': False}),
    'Activation': (_activation, {}),
    'Pooling': (_max_pooling, {'pool_type': 'max', 'global_pool': False}),
    'slice': (_slice, {'step': None}),
    '_contrib_AdaptiveAvgPooling2D': (_simply('GlobalAveragePool'), {'output_size': 1}),
    'Flatten': (_simply('Flatten'), {}),
    'FullyConnected': (_dense, {}),
    'elemwise_add': (_simply('Add'), {}),
    'broadcast_add': (_simply('Add'), {}),
}


def _translation(op, attributes):
    """The translation of the operator `op`. Raises UserError when there is none for these attributes."""
    translation, needed = _TRANSLATIONS.get(op, (None, {}))
    other = {key: attributes.get(key) for key, value in needed.items() if attributes.get(key) != value}
    if translation is None or other:
        raise UserError('the operator {}{} of this network has no translation to ONNX here; export it with --format '
                        'symbol'.format(op, ''.join(f' with {key}={value}' for key, value in other.items())))
    return translation
