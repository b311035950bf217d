"""What was measured, as rows: their ratios, the tables on the console, the chart."""
import statistics

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of a backend that needs no display

from gn_gluon.errors import UserError  # noqa: E402
from norm_benchmark.contestants import COMPARISONS, CONTESTANTS  # noqa: E402

MXNET_BN = ('mxnet-bn',)
TORCH_GN = ('torch-gn', 'torch-gn-channels_last')
COLOURS = {'torch': 'tab:orange', 'stock': 'tab:gray', 'native': 'tab:green', 'extension': 'tab:olive',
           'composed': 'tab:cyan'}


def make_rows(case, results):
    """One dict for each contestant and layer, and for layers one more with the sum over all norms of the network.

    A row's `ratio_to_reference` is that of the medians of one group: ratios between groups go by way of it.
    """
    rows = []
    for name in sorted(results, key=_place):
        result = results[name]
        values, reference = dict(result['values']), dict(result['reference_values'])
        if case['layers']:
            total = f"all {sum(layer['count'] for layer in case['layers'])} norms"
            values[total], reference[total] = _total(case, values), _total(case, reference)
        for layer in values:
            first, median, third = quartiles(values[layer])
            rows.append({
                'what': case['what'], 'network': case['network'], 'batch': case['batch'], 'layer': layer or None,
                'contestant': name, 'unit': 'byte' if case['what'] == 'memory' else 'second',
                'values': values[layer], 'median': median, 'first_quartile': first, 'third_quartile': third,
                'group': result['group'], 'reference': result['reference'], 'reference_values': reference[layer],
                'ratio_to_reference': median / statistics.median(reference[layer])})
    return rows


def _place(name):
    """For sorting: MXNet's own, ours, PyTorch's; among themselves as they are started."""
    place = [contestant.name for contestant in CONTESTANTS].index(name)
    return CONTESTANTS[place].framework, CONTESTANTS[place].operator is not None, place


def _total(case, values):
    rounds = zip(*([layer['count'] * value for value in values[layer['name']]] for layer in case['layers']))
    return [sum(times) for times in rounds]


def quartiles(values):
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values * 3
    return statistics.quantiles(values, n=4, method='inclusive')


def ratio(rows, contestant, others):
    """The contestant's median over that of the best of `others`, or None; `rows` are those of one case and layer."""
    relative = {row['contestant']: row['ratio_to_reference'] for row in rows}
    best = min((relative[other] for other in others if other in relative), default=None)
    if best is None or contestant not in relative:
        return None
    return relative[contestant] / best


def by_layer(rows):
    """The rows in lists of one case and layer each: {(what, network, batch, layer): rows}."""
    tables = {}
    for row in rows:
        tables.setdefault((row['what'], row['network'], row['batch'], row['layer']), []).append(row)
    return tables


def add_ratios(rows):
    """Gives each row its ratios to MXNet's BN and to PyTorch's GN in its better layout (None: not measured)."""
    for table in by_layer(rows).values():
        for row in table:
            row['ratio_to_mxnet_bn'] = ratio(table, row['contestant'], MXNET_BN)
            row['ratio_to_torch_gn'] = ratio(table, row['contestant'], TORCH_GN)


def compare(rows):
    """The COMPARISONS of each case, where both sides were measured: a list of dicts. Layers: of their sum."""
    found = []
    for (what, network, batch, layer), table in by_layer(rows).items():
        for contestant, others in COMPARISONS if is_total(layer) else ():
            quotient = ratio(table, contestant, others)
            if quotient is not None:
                found.append({'what': what, 'network': network, 'batch': batch, 'contestant': contestant,
                              'against': ' or '.join(others), 'ratio': quotient})
    return found


def is_total(layer):
    """Whether a row is that of a whole network, or of all its norms together."""
    return layer is None or layer.startswith('all ')


# ------------------------------------------------------------------------------------------------- the console

def text_table(head, lines):
    """Columns side by side, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *lines)]
    return '\n'.join('  '.join([line[0].ljust(widths[0])] + [cell.rjust(width) for cell, width
                                                             in zip(line[1:], widths[1:])]).rstrip()
                     for line in [head, *lines])


def show_case(rows, absent):
    """The table of a case: one block for each of its layers; who is absent, and why."""
    lines = []
    for (what, network, batch, layer), table in by_layer(rows).items():
        scale, unit, digits = (2 ** 20, 'MiB', 0) if what == 'memory' else (1e-3, 'ms', 2)
        head = [f"{what}, {network}, batch {batch}{', ' + layer if layer else ''}", f'median [{unit}]', 'quartiles',
                'n', '/ mxnet-bn', '/ torch-gn', 'group']
        lines += ['', text_table(head, [
            [row['contestant'], f"{row['median'] / scale:.{digits}f}",
             f"{row['first_quartile'] / scale:.{digits}f} - {row['third_quartile'] / scale:.{digits}f}",
             str(len(row['values'])), _two_digits(row['ratio_to_mxnet_bn']), _two_digits(row['ratio_to_torch_gn']),
             str(row['group'])] for row in table])]
    reasons = {}
    for name, reason in absent.items():
        reasons.setdefault(reason, []).append(name)
    lines += [f"not available: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return '\n'.join(lines)


def show_comparisons(comparisons):
    """The ratios of COMPARISONS, those of the same contestants together."""
    lines = [[f"{found['contestant']} / {found['against']}", f"{found['what']} {found['network']} {found['batch']}",
              _two_digits(found['ratio'])] for found in comparisons]
    pairs = [line[0] for line in lines]
    return text_table(['contestant / the better of', 'case', 'ratio'],
                      sorted(lines, key=lambda line: pairs.index(line[0])))


def show_attribution(name, attribution):
    """Where a step goes, the largest part first and the small ones together. `attribution`: see instruments."""
    step = attribution['step']
    large = {kind: part for kind, part in attribution['parts'].items() if part['seconds'] >= 0.005 * step}
    small = [part for kind, part in attribution['parts'].items() if kind not in large]
    parts = sorted(large.items(), key=lambda part: -part[1]['seconds'])
    parts.append((f'{len(small)} kinds below 0.5 %', {field: sum(part[field] for part in small)
                                                     for field in ('seconds', 'count')}))
    parts.append(('the rest', {'seconds': step - sum(part['seconds'] for _, part in parts), 'count': ''}))
    parts.append(('the step', {'seconds': step, 'count': ''}))
    return text_table([name, 'ms', '% of step', 'number'], [
        [kind, f"{part['seconds'] * 1e3:.2f}", f"{100 * part['seconds'] / step:.1f}", str(part['count'])]
        for kind, part in parts])


def _two_digits(number):
    return '-' if number is None else f'{number:.2f}'


# --------------------------------------------------------------------------------------------------- the chart

def draw(rows, title, path):
    """A bar for each contestant, a panel for each case (for layers: all norms of the network); the ratios beside it.

    Raises UserError when the file cannot be written.
    """
    tables = {key: table for key, table in by_layer(rows).items() if is_total(key[3])}
    across = min(3, len(tables))
    down = -(-len(tables) // across)
    bars = max(len(table) for table in tables.values())
    figure, axes = plt.subplots(down, across, figsize=(5.5 * across, down * (1.2 + 0.27 * bars)), squeeze=False,
                                constrained_layout=True)
    for axis, (key, table) in zip(axes.flat, tables.items()):
        _panel(axis, key, table)
    for axis in axes.flat[len(tables):]:
        axis.axis('off')
    figure.suptitle(f'{title}\nbars: medians, whiskers: quartiles, numbers: ratio to mxnet-bn, hatched: bfloat16',
                    fontsize='medium')
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f'cannot write {path}: {error}') from None
    finally:
        plt.close(figure)


def _panel(axis, key, table):
    what, network, batch, layer = key
    scale, unit = (2 ** 20, 'MiB') if what == 'memory' else (1e-3, 'ms')
    about = {contestant.name: contestant for contestant in CONTESTANTS}
    medians = [row['median'] / scale for row in table]
    spread = [[(row['median'] - row['first_quartile']) / scale for row in table],
              [(row['third_quartile'] - row['median']) / scale for row in table]]
    colours = [COLOURS[contestant.operator or ('torch' if contestant.framework == 'torch' else 'stock')]
               for contestant in (about[row['contestant']] for row in table)]
    drawn = axis.barh(range(len(table)), medians, xerr=spread, color=colours, error_kw={'elinewidth': 1, 'capsize': 2})
    for bar, row in zip(drawn, table):
        if about[row['contestant']].dtype == 'bfloat16':
            bar.set(hatch='///', edgecolor='white', linewidth=0)
    ratios = [_two_digits(row['ratio_to_mxnet_bn']) if row['ratio_to_mxnet_bn'] else '' for row in table]
    axis.bar_label(drawn, ratios, padding=4, fontsize='small')
    axis.set_yticks(range(len(table)))
    axis.set_yticklabels([row['contestant'] for row in table], fontsize='small')
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel(unit, fontsize='small')
    axis.set_title(f"{what}, {network}, batch {batch}{', ' + layer if layer else ''}", fontsize='medium')
