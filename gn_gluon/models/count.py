"""Counts parameters and multiply-adds of a network from its graph: no weights, no images, no device."""
import json

import mxnet as mx
import numpy as np


def _shapes(net, input_shape):
    """The graph of `net`, and the shapes of its trained parameters and of its operators' outputs, by name."""
    graph = net(mx.sym.var('data'))
    shape = (1,) + tuple(input_shape)
    parameters = dict(zip(graph.list_arguments(), graph.infer_shape(data=shape)[0]))
    del parameters['data']
    operators = graph.get_internals()
    return graph, parameters, dict(zip(operators.list_outputs(), operators.infer_shape(data=shape)[1]))


def count_parameters(net, input_shape):
    """The number of parameters of `net` for images of `input_shape` (C, H, W): running statistics are none."""
    return int(sum(np.prod(shape) for shape in _shapes(net, input_shape)[1].values()))


def count_multiply_adds(net, input_shape):
    """The multiply-adds of convolutions and dense layers for one image of `input_shape` (C, H, W)."""
    graph, parameters, outputs = _shapes(net, input_shape)
    nodes = json.loads(graph.tojson())['nodes']
    total = 0
    for node in nodes:
        if node['op'] in ('Convolution', 'FullyConnected'):
            weight = nodes[node['inputs'][1][0]]['name']
            if weight in parameters:  # and not the identity of a shortcut, which stands for a copy
                pixels = outputs[node['name'] + '_output'][2:]
                total += int(np.prod(parameters[weight])) * int(np.prod(pixels))
    return total
