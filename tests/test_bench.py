"""tools/bench_norm.py: its ratios, what it measures, and that a contestant's failure stays its own."""
import functools
import json
import os
import subprocess
import sys

import mxnet as mx
import numpy as np
import pytest

from gn_gluon import GroupNorm
from gn_gluon.models import CifarResNet, ResNet

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(os.path.join(ROOT, 'tools'))

import bench_norm  # noqa: E402
from norm_benchmark import contestants, instruments, mxnet_side, pool, report  # noqa: E402

NAMED = {contestant.name: contestant for contestant in contestants.CONTESTANTS}


def environment(contestant, case):
    return pool.environment_for(os.environ, 1, [], contestant, case)


def test_a_case_in_two_groups_gives_tables_json_and_chart(tmp_path, monkeypatch, capsys):
    layers = [{'name': 'small +relu', 'channels': 16, 'size': 4, 'residual': False, 'relu': True, 'count': 3},
              {'name': 'small +residual', 'channels': 16, 'size': 2, 'residual': True, 'relu': False, 'count': 2}]
    monkeypatch.setattr(contestants, 'norm_layers', lambda network: layers)
    monkeypatch.setattr(pool, 'available_memory', lambda: 0)  # so each contestant has only the reference beside it
    monkeypatch.setattr(sys, 'argv', [
        'bench_norm.py', '--what', 'layer', '--network', 'cifar_resnet20', '--batch', '2', '--rounds', '1', '--threads',
        '1', '--only', 'mxnet-bn*,composed', '--json', f'{tmp_path}/bench.json', '--png', f'{tmp_path}/bench.png'])
    bench_norm.main()

    written = json.loads((tmp_path / 'bench.json').read_text())
    assert written['machine']['threads'] == 1 and 0 <= written['machine']['share_of_others'] <= 1
    rows = {(row['contestant'], row['layer']): row for row in written['rows']}
    names = ('mxnet-bn', 'mxnet-bn-relu', 'composed')
    assert set(rows) == {(name, layer) for name in names for layer in ('small +relu', 'small +residual', 'all 5 norms')}
    assert [rows[name, 'all 5 norms']['group'] for name in names] == [0, 0, 1]
    for name in names:
        plain, residual, total = (rows[name, layer] for layer in ('small +relu', 'small +residual', 'all 5 norms'))
        assert plain['unit'] == 'second' and plain['values'][0] > 0
        assert total['values'] == [pytest.approx(3 * plain['values'][0] + 2 * residual['values'][0])]
    # the second group has a reference of its own round
    assert rows['composed', 'all 5 norms']['reference_values'] != rows['mxnet-bn', 'all 5 norms']['values']
    assert [comparison['contestant'] for comparison in written['comparisons']] == ['composed']
    assert (tmp_path / 'bench.png').read_bytes().startswith(b'\x89PNG')
    assert capsys.readouterr().out.count('\ncomposed ') == 4  # both layers, their sum, the comparison


def results_of(**values):
    return {name: {'group': 0, 'values': {'': list(mine)}, 'reference': 'mxnet-bn',
                   'reference_values': {'': list(reference)}} for name, (mine, reference) in values.items()}


def test_ratios_are_of_medians_within_a_group_and_by_the_reference_between_groups():
    case = {'what': 'step', 'network': 'resnet50', 'batch': 8, 'layers': []}
    first, second = (2, 1, 30), (4, 5, 3)  # the second group ran while the machine was half as fast
    rows = report.make_rows(case, results_of(**{
        'mxnet-bn': (first, first), 'native': ((1.8, 1.8, 9), first), 'torch-gn': ((3, 3, 3), first),
        'torch-gn-channels_last': ((4.8, 4.8, 4.8), second)}))
    report.add_ratios(rows)
    ratios = {row['contestant']: (row['ratio_to_mxnet_bn'], row['ratio_to_torch_gn']) for row in rows}
    assert ratios['native'] == pytest.approx((0.9, 0.9 / 1.2))
    assert ratios['torch-gn-channels_last'] == pytest.approx((1.2, 1))
    assert {comparison['against']: comparison['ratio'] for comparison in report.compare(rows)} == pytest.approx(
        {'mxnet-bn': 0.9, 'torch-gn or torch-gn-channels_last': 0.75})
    native = next(row for row in rows if row['contestant'] == 'native')
    assert (native['first_quartile'], native['median'], native['third_quartile']) == pytest.approx((1.8, 1.8, 5.4))


def test_without_mxnet_bn_there_is_no_ratio_to_it():
    rows = report.make_rows({'what': 'step', 'network': 'resnet50', 'batch': 8, 'layers': []},
                            results_of(native=([1], [1])))
    report.add_ratios(rows)
    assert rows[0]['ratio_to_mxnet_bn'] is None and report.compare(rows) == []
    assert 'native' in report.show_case(rows, {})


def test_a_contestant_that_cannot_start_or_dies_is_absent_with_its_reason(tmp_path):
    deaths = {'torch-gn': 'raise ImportError("no torch here")', 'torch-bn': 'import os; os.kill(os.getpid(), 4)'}
    for name, code in deaths.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / 'torch.py').write_text(code)

    def without_torch(contestant, case):
        return dict(environment(contestant, case), PYTHONPATH=str(tmp_path / contestant.name))

    results, absent = pool.measure(contestants.make_case('step', 'cifar_resnet20', 2, 1),
                                   [NAMED[name] for name in deaths], 1, without_torch, print)
    assert results == {}
    assert absent == {'torch-gn': 'no torch here', 'torch-bn': 'ended by SIGILL'}


def test_lines_of_onednn_are_summed_by_primitive_and_direction():
    two = 'dnnl_verbose,exec,cpu,{},jit:avx512_core,{},{},,alg:x,mb8_ic3oc64,{}'
    three = 'onednn_verbose,v1,primitive,exec,cpu,{},jit,{},{},attr,alg,mb8,{}'
    lines = [
        'dnnl_verbose,info,oneDNN v2.4.4',
        two.format('convolution', 'backward_data', 'src_f32::blocked:abcd:f0 dst_f32::blocked:abcd:f0', 1.5),
        two.format('convolution', 'forward_training', 'src_f32::blocked:abcd:f0', 2),
        two.format('reorder', 'undef', 'src_f32::blocked:abcd:f0 dst_f32::blocked:aBcd16b:f0', 4),
        two.format('reorder', 'undef', 'src_f32::blocked:abcd:f0 dst_bf16::blocked:aBcd16b:f0', 8),
        'what else is printed',
        three.format('convolution', 'backward_data', 'src:f32::blocked:abcd::f0', 0.5),
        three.format('reorder', 'undef', 'src:bf16::blocked:abcd::f0 dst:f32::blocked:acdb::f0', 16)]
    assert instruments.parse_verbose('\n'.join(lines)) == {
        'convolution backward_data': [pytest.approx(0.002), 2], 'convolution forward': [0.002, 1],
        'reorder': [0.004, 1], 'reorder f32 to bf16': [0.008, 1], 'reorder bf16 to f32': [0.016, 1]}


@pytest.mark.parametrize('arguments, words', [
    (['--what', 'steps'], "'steps' is none of layer, step"), (['--rounds', '0'], '--rounds 0'),
    (['--only', 'nativ'], '--only nativ: none of mxnet-bn'), (['--env', 'torch:X'], '--env torch:X'),
    (['--roundz', '3'], '--roundz'), (['--json', 'missing/x.json'], 'missing/x.json'),
    (['--attribute', '--png', 'x.png'], '--png')])
def test_bad_flags_are_refused_in_one_sentence(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['bench_norm.py'] + arguments)
    with pytest.raises(SystemExit) as stop:
        bench_norm.command(bench_norm.main)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and not captured.out
    assert words in captured.err and len(captured.err.splitlines()) == 1


def test_the_variables_of_a_process_are_those_of_its_contestant():
    case = contestants.make_case('step', 'cifar_resnet20', 2, 3)
    extra = [('torch', 'A', '1'), (None, 'B', '2')]

    def variables(name):
        outside = {'MXNET_OMP_MAX_THREADS': '8', 'GN_GLUON_OPERATOR': 'x'}
        return pool.environment_for(outside, 3, extra, NAMED[name], case)

    assert variables('native') == {'OMP_NUM_THREADS': '3', 'GN_GLUON_OPERATOR': 'native', 'B': '2'}
    assert variables('mxnet-bn') == {'OMP_NUM_THREADS': '3', 'B': '2'}  # what gn_gluon chooses by itself
    assert variables('torch-gn')['A'] == '1'


# --------------------------------------------------------------------------------- the contestants are what they say

def test_the_layers_are_the_norms_of_the_network():
    layers = contestants.norm_layers('resnet50')
    assert sum(layer['count'] for layer in layers) == 53
    assert sum(layer['count'] for layer in layers if layer['residual']) == 16  # one for each block
    assert {layer['name']: layer['count'] for layer in layers}['1024x14x14 +residual +relu'] == 6


def network(name):
    case = dict(contestants.make_case('step', 'cifar_resnet20', 2, 1), contestant=NAMED[name]._asdict())
    return CifarResNet(mxnet_side.choose_norm(case))


def scramble(net, images):
    """Random parameters everywhere: a gamma of zero would hide its whole branch."""
    net.infer_shape(images)
    net.initialize()
    for i, parameter in enumerate(net.collect_params().values()):
        random = np.random.RandomState(i).uniform(0.5, 1.5, parameter.shape)
        parameter.set_data(random * np.sqrt(2 / np.prod(parameter.shape[1:])) * (-1) ** (random > 1)
                           if len(parameter.shape) > 1 else random)


def test_batch_norm_with_its_relu_fused_is_the_same_network():
    images = mx.nd.random.normal(shape=(2, 3, 32, 32))
    plain, fused = network('mxnet-bn'), network('mxnet-bn-relu')
    for net in (plain, fused):
        scramble(net, images)
    np.testing.assert_allclose(plain(images).asnumpy(), fused(images).asnumpy(), rtol=1e-4, atol=1e-4)
    operators = [node['op'] for node in json.loads(fused(mx.sym.var('data')).tojson())['nodes']]
    # nine blocks: their second norm is followed by the sum
    assert operators.count('_contrib_BatchNormWithReLU') == 10 and operators.count('BatchNorm') == 9


@pytest.mark.parametrize('name, model', [('resnet50', ResNet), ('cifar_resnet20', CifarResNet)])
def test_pytorch_computes_the_same_network(name, model):
    torch = pytest.importorskip('torch', reason='PyTorch is not installed')
    from norm_benchmark import torch_side
    case = contestants.make_case('step', name, 2, 1)
    images = mx.nd.random.normal(shape=(2, 3, 64, 64))
    ours = model(functools.partial(GroupNorm, case['num_groups']), case['num_classes'])
    scramble(ours, images)
    theirs = torch_side.make_network(case, functools.partial(torch.nn.GroupNorm, case['num_groups']))
    parameters = list(ours.collect_params().values())
    assert len(parameters) == len(list(theirs.parameters()))
    for mine, other in zip(parameters, theirs.parameters()):
        other.data = torch.from_numpy(mine.data().asnumpy())
    logits = theirs(torch.from_numpy(images.asnumpy())).detach().numpy()
    np.testing.assert_allclose(ours(images).asnumpy(), logits, rtol=1e-3, atol=1e-3 * np.abs(logits).max())


def test_the_command_itself_refuses_in_one_line():
    ended = subprocess.run([sys.executable, 'tools/bench_norm.py', '--batch', '8;2'], cwd=ROOT, stderr=subprocess.PIPE,
                           text=True)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == 'error: --batch 8;2: give whole numbers above 0'
