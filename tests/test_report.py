"""gn_gluon.report: its figures are those of the run folders, the paper's cells hold only the paper's experiments."""
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest

from gn_gluon import config, experiment, paper, plot, report
from gn_gluon.errors import UserError, command
from gn_gluon.runs import collect

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DIGITS = {'num_classes': 10, 'image_shape': [1, 8, 8], 'num_train': 1437, 'num_validation': 360}
IMAGENET = {'num_classes': 1000, 'image_shape': [3, 224, 224], 'num_train': 1281167, 'num_validation': 50000}


class Page(html.parser.HTMLParser):
    """What a browser would make of the page: tables {title: {row: {column: text}}}, and all elements."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.elements, self.text, self._cell, self._rows = {}, [], '', None, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ('th', 'td', 'strong', 'title', 'desc'):
            self._cell = ''
        if tag == 'tr':
            self._rows.append([])

    def handle_data(self, data):
        self.text += data
        if self._cell is not None:
            self._cell += data

    def handle_endtag(self, tag):
        if tag in ('th', 'td'):
            self._rows[-1].append(self._cell)
        elif tag == 'strong':
            self._title, self._rows = self._cell, []
        elif tag == 'table':
            head, *rows = self._rows
            self.tables.setdefault(self._title, {}).update((row[0], dict(zip(head, row))) for row in rows)


def make_run(folder, gin_file, bindings=(), description=None, done=None, seed=0):
    """A run folder as training leaves it, with made-up errors; returns the validation errors of its epochs."""
    description = dict(description or DIGITS, class_names=None)
    config.parse([gin_file], [*bindings, f'train.seed = {seed}'])
    made = config.make(experiment.Experiment)
    experiment.Built(made, '', description=description)
    rng = np.random.default_rng(seed)
    errors = []
    rows = ''
    for epoch in range(made.num_epochs if done is None else done):
        for split in ('train', 'validation'):
            number = description['num_' + split]
            error = 100 * rng.integers(number // 5, number // 3) / number
            rows += json.dumps({
                'epoch': epoch, 'learning_rate': 0.1, 'split': split, 'loss': rng.random(), 'top1_error': error,
                'top5_error': error / 5, 'num_samples': number, 'images_per_second': 1000 * rng.random(),
                **({'peak_memory_bytes': 2**28, 'data_wait_share': 0.0125} if split == 'train' else {})}) + '\n'
        errors.append(error)
    folder.mkdir(parents=True)
    environment = {'command': ['train.py', '--gin_file', gin_file], 'devices': ['cpu(0)'], 'threads': 2, 'resumed': [],
                   'platform': 'Linux'}
    for name, text in (('config.gin', config.operative_config()), ('metrics.jsonl', rows),
                       ('environment.json', json.dumps(environment)), ('dataset.json', json.dumps(description))):
        (folder / name).write_text(text)
    return errors


def make_sweep(folder, seeds, settings=('train.batch_per_replica',)):
    """A sweep.json of BN with these errors, {images per replica: one for each seed}; None: not run."""
    rows = []
    for batch, errors in seeds.items():
        known = [error for error in errors if error is not None]
        rows.append({
            'gin_file': 'digits_bn_bs2.gin', 'norm': 'BatchNorm', 'model': 'ConvNet', 'dataset': 'Digits',
            'settings': dict.fromkeys(settings, str(batch)), 'num_replicas': 32 // batch, 'batch_per_replica': batch,
            'num_samples': 360, 'last_epochs': 5, 'statistics': {}, 'top1_error': {
                'seeds': errors, 'n': len(known), 'mean': np.mean(known) if known else None,
                'standard_deviation': np.std(known, ddof=1) if len(known) > 1 else None}})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'sweep.json').write_text(json.dumps({'rows': rows}))


def make_page(*roots):
    out = os.path.join(os.path.dirname(roots[0]), 'report.html')
    report.make_report([str(root) for root in roots], out, 'Title')
    with open(out) as file:
        return Page(file.read())


def median5(errors):
    return sorted(errors[-5:])[2]


def test_a_seed_that_ran_twice_counts_once(tmp_path):
    runs = tmp_path / 'runs'
    errors = [median5(make_run(runs / name, 'digits_gn_bs2.gin', seed=seed)) for name, seed in
              (('alone', 0), ('again', 0), ('other', 1))]
    page = make_page(runs)
    row = page.tables['Digits: 1,437 training and 360 validation images of 1 x 8 x 8']['ConvNet, GN, 16 x 2']
    means = [np.mean(errors[:2]), errors[2]]
    assert (row['seed'], row['n'], row['mean']) == ('0, 1', '2', f'{np.mean(means):.2f}')
    assert row['standard deviation'] == f'{np.std(means, ddof=1):.2f}'


def test_the_figures_of_runs_are_those_of_their_metrics(tmp_path):
    runs = tmp_path / 'runs'
    errors = {f'sweep/gn,seed={seed}': make_run(runs / 'sweep' / f'gn,seed={seed}', 'digits_gn_bs2.gin', seed=seed)
              for seed in range(3)}
    errors['bn'] = make_run(runs / 'bn', 'digits_bn_bs2.gin', done=7)
    page = make_page(runs)

    assert set(page.tables['All runs']) == set(errors)
    for name, row in page.tables['All runs'].items():
        assert row['error [%]'] == f'{median5(errors[name]):.2f}'
        with open(runs / name / 'metrics.jsonl') as file:
            rows = [json.loads(line) for line in file]
        assert row['validation loss'] == f"{rows[-1]['loss']:.4f}" and row['training loss'] == f"{rows[-2]['loss']:.4f}"
        assert row['images/s'] == f"{np.median([r['images_per_second'] for r in rows if r['split'] == 'train']):.0f}"
        assert (row['memory [MiB]'], row['waiting [%]'], row['of images']) == ('256', '1.2', '360')
    unfinished = page.tables['All runs']['bn']
    assert unfinished['epochs'] == '7 of 15' and unfinished['state'] == 'unfinished'

    seeds = page.tables['Digits: 1,437 training and 360 validation images of 1 x 8 x 8']
    medians = [median5(errors[name]) for name in errors if name != 'bn']
    assert list(seeds) == ['ConvNet, GN, 16 x 2']  # not the unfinished one
    row = seeds['ConvNet, GN, 16 x 2']
    assert (row['seed'], row['n']) == ('0, 1, 2', '3')
    assert row['mean'] == f'{np.mean(medians):.2f}'
    assert row['standard deviation'] == f'{np.std(medians, ddof=1):.2f}'
    markdown = (tmp_path / 'report.md').read_text()
    assert '| {} |'.format(' | '.join(row.values())) in markdown


def filled(page):
    """(table, row) of the paper's figures beside which there is one of ours."""
    return {(title, head) for title in paper.UNITS for head, row in page.tables[title].items()
            if row.get('ours, median of last 5', row.get('ours')) != 'not run'}


def test_runs_of_the_paper_stand_beside_its_figures_and_all_others_are_not_run(tmp_path):
    runs = tmp_path / 'runs'
    medians = [median5(make_run(runs / str(seed), 'resnet50_gn_bs32.gin', description=IMAGENET, seed=seed))
               for seed in (3, 4)]
    make_run(runs / 'vgg', 'vgg16_none.gin', ["train.devices = 'cpu'"], IMAGENET)
    page = make_page(runs)
    assert filled(page) == {('Table 1', 'GN, b = 32'), ('Table 2', 'GN, b = 32'), ('Table 3, groups', 'GN, G = 32'),
                            ('VGG-16', 'no norm, b = 32')}
    assert list(page.tables['Table 1']['GN, b = 32'].values())[1:] == [
        '24.1', f'{np.mean(medians):.2f} ± {np.std(medians, ddof=1):.2f}', f'{np.mean(medians) - 24.1:+.2f}', '100',
        '3, 4', '2', 'resnet50_gn_bs32']
    assert page.tables['VGG-16']['no norm, b = 32']['paper'] == '29.2 (unverified)'
    assert 'Our other runs of these recipes' not in page.tables


def test_every_figure_of_the_paper_is_on_the_page(tmp_path):
    make_run(tmp_path / 'runs', 'digits_gn_bs2.gin')
    page = make_page(tmp_path / 'runs')
    assert not filled(page)
    for cell in paper.CELLS:
        table = page.tables[cell.table]
        text = (table[f'{cell.row}, {cell.column}']['paper'] if cell.run else table[cell.row][f'paper: {cell.column}'])
        assert text == f'{cell.value:.1f}' + ('' if cell.verified else ' (unverified)')


@pytest.mark.parametrize('bindings, data, done, differs', [
    (['ImageNet.image_size = 64'], {'image_shape': [3, 64, 64]}, 100, 'ImageNet.image_size: 64 (recipe: 224)'),
    (['train.num_epochs = 6'], {}, 6, 'train.num_epochs: 6 (recipe: 100)'),
    ([], {}, 99, 'epochs finished: 99 (recipe: 100)'),
    (["train.dtype = 'bfloat16'"], {}, 100, "train.dtype: 'bfloat16' (recipe: 'float32')"),
    (['train.initial_weights = "trained.params"'], {}, 100, "train.initial_weights: 'trained.params' (recipe: None)"),
    ([], {'num_classes': 100}, 100, 'classes: 100 (recipe: 1000)'),
    ([], {'num_validation': 5000}, 100, 'images: 1,281,167 and 5,000 of 3 x 224 x 224'),
    (['train.dataset = @TinyImageNet'], {'image_shape': [3, 64, 64]}, 100, 'train.dataset: @TinyImageNet'),
])
def test_a_run_that_is_not_quite_the_papers_fills_no_cell_and_says_why(tmp_path, bindings, data, done, differs):
    make_run(tmp_path / 'runs' / 'cut', 'resnet50_gn_bs2.gin', bindings, dict(IMAGENET, **data), done)
    page = make_page(tmp_path / 'runs')
    assert not filled(page)
    row = page.tables['Our other runs of these recipes']['cut']
    assert row['gin file'] == 'resnet50_gn_bs2' and differs in row['what differs']


def test_only_runs_that_differ_in_nothing_but_the_seed_are_averaged(tmp_path):
    for i, bindings in enumerate(([], ['train.weight_decay = 0.01'], ['train.images_at_once = 16'])):
        make_run(tmp_path / 'runs' / str(i), 'digits_gn_bs2.gin', bindings, seed=i)
    make_run(tmp_path / 'runs' / 'other data', 'digits_gn_bs2.gin', description=dict(DIGITS, num_validation=300))
    page = make_page(tmp_path / 'runs')
    counts = {head: row['n'] for title, table in page.tables.items() if title.startswith('Digits')
              for head, row in table.items()}
    assert counts == {'ConvNet, GN, 16 x 2, train.weight_decay = 0.0001': '2',
                      'ConvNet, GN, 16 x 2, train.weight_decay = 0.01': '1', 'ConvNet, GN, 16 x 2': '1'}


def test_the_figures_by_bns_statistics_are_those_of_evaluation_json(tmp_path):
    for seed, errors in enumerate(((10, 20.5, 30), (11, 21.5, 31))):
        make_run(tmp_path / 'runs' / str(seed), 'digits_bn_bs2.gin', seed=seed)
        figures = [{'statistics': name, 'top1_error': error}
                   for name, error in zip(('running', 'batch', 'precise'), errors)]
        (tmp_path / 'runs' / str(seed) / 'evaluation.json').write_text(json.dumps({'figures': figures}))
    row = make_page(tmp_path / 'runs').tables['Digits: 1,437 training and 360 validation images of 1 x 8 x 8'][
        'ConvNet, BN, 16 x 2']
    assert list(row.values())[1:] == ['10.50 ± 0.71 (n = 2)', '21.00 ± 0.71 (n = 2)', '30.50 ± 0.71 (n = 2)', '–']


def _damage_second_row(text):
    return text.replace('\n', '\n{"epoch": 1, "spl\n', 1)


@pytest.mark.parametrize('name, damage, why', [
    ('config.gin', lambda text: 'train.model = (', 'config.gin is damaged'),
    ('config.gin', lambda text: text.replace('train.seed', 'train.need'), "'train.seed' is missing"),
    ('config.gin', None, 'config.gin is missing'),
    ('dataset.json', lambda text: text[:20], 'dataset.json is cut or is not JSON'),
    ('environment.json', lambda text: '[]', 'list indices'),
    ('metrics.jsonl', _damage_second_row, 'line 2 of metrics.jsonl is not JSON'),
    ('metrics.jsonl', lambda text: text.replace('"loss": 0', '"loss": 1e999, "was": 0', 1), 'loss of epoch 1 is inf'),
    ('metrics.jsonl', lambda text: text.split('\n', 2)[2], 'do not follow one another'),
])
def test_a_damaged_run_is_named_and_the_others_are_reported(tmp_path, name, damage, why):
    for folder in ('good', 'bad'):
        make_run(tmp_path / 'runs' / folder, 'digits_gn_bs2.gin')
    (tmp_path / 'runs' / 'empty').mkdir()
    path = tmp_path / 'runs' / 'bad' / name
    text = path.read_text()
    path.unlink()
    if damage:
        path.write_text(damage(text))
    page = make_page(tmp_path / 'runs')
    assert list(page.tables['All runs']) == ['good']
    assert why in page.text and 'runs/bad' in page.text and 'runs/empty' in page.text
    path.parent.rename(tmp_path / 'alone')
    with pytest.raises(UserError, match='no run could be read'):
        make_page(tmp_path / 'alone')


def test_what_a_kill_leaves_is_read_up_to_the_last_whole_epoch(tmp_path):
    make_run(tmp_path / 'cut', 'digits_gn_bs2.gin', done=3)
    path = tmp_path / 'cut' / 'metrics.jsonl'
    path.write_text(path.read_text()[:-30])
    make_run(tmp_path / 'at once', 'digits_gn_bs2.gin', done=0)
    runs, _, unreadable = collect([str(tmp_path)])
    assert {run.name: run.done for run in runs} == {'cut': 2, 'at once': 0} and not unreadable
    assert make_page(tmp_path / 'at once').tables['All runs']['at once']['error [%]'] == '–'


def test_names_from_files_stay_text(tmp_path):
    names = ['<script>alert(1)', '<img src=x onerror=alert(1)> | `$\\frac{$` "\'&']
    for name in names:
        make_run(tmp_path / 'runs' / name, 'digits_gn_bs2.gin', done=2)
    page = make_page(tmp_path / 'runs')
    assert set(page.tables['All runs']) == set(names)
    assert not [tag for tag, _ in page.elements if tag in ('script', 'img')]
    markdown = (tmp_path / 'report.md').read_text()
    assert not re.search(r'(?<!\\)<', markdown)
    assert r'\<img src=x onerror=alert(1)\> \| \`$\\frac{$\`' in markdown


def test_the_page_needs_nothing_from_elsewhere_and_its_figures_say_their_numbers(tmp_path):
    last = make_run(tmp_path / 'runs' / 'gn', 'digits_gn_bs2.gin')[-1]
    for i in range(report.MOST_LINES):
        make_run(tmp_path / 'runs' / str(i), 'digits_bn_bs2.gin', [f'train.weight_decay = {i}.5'])
    page = make_page(tmp_path / 'runs')
    assert not [tag for tag, _ in page.elements if tag in ('script', 'link', 'img', 'iframe', 'object')]
    ids = [attributes['id'] for _, attributes in page.elements if 'id' in attributes]
    assert len(ids) == len(set(ids))
    targets = [value for _, attributes in page.elements for key, value in attributes.items()
               if key in ('src', 'href', 'xlink:href')]
    targets += re.findall(r'url\(([^)]*)\)', (tmp_path / 'report.html').read_text())
    assert targets and {target[1:] for target in targets} <= set(ids) and all(t.startswith('#') for t in targets)

    figures = [attributes for tag, attributes in page.elements if tag == 'svg']
    assert len(figures) == 4 and all(figure['role'] == 'img' for figure in figures)  # curves and speed, in two parts
    said = ' '.join(figure['aria-label'] for figure in figures)
    assert f'ConvNet, GN, 16 x 2: {last:.2f} %, loss' in said
    for i in range(report.MOST_LINES):
        assert said.count(f'train.weight_decay = {i}.5: ') == 2
    for name in re.findall(r'report_figures/[\w-]+\.svg', (tmp_path / 'report.md').read_text()):
        assert (tmp_path / name).read_text().startswith('<svg ')


def test_a_sweep_stands_beside_figure_1_with_its_numbers_and_a_damaged_one_is_named(tmp_path):
    runs = tmp_path / 'runs'
    make_run(runs / 'gn', 'digits_gn_bs2.gin', done=2)
    make_sweep(runs / 'sizes', {2: [5.5, 6.5], 4: [4.25, None], 8: [None, None]})
    make_sweep(runs / 'other', {2: [1.25]}, settings=('train.weight_decay',))
    make_sweep(runs / 'new', {2: [None, None]})
    make_sweep(runs / 'bad', {2: [1.25]})
    path = runs / 'bad' / 'sweep.json'
    path.write_text(path.read_text().replace('"norm"', '"mron"'))
    page = make_page(runs)
    said = [attributes['aria-label'] for tag, attributes in page.elements
            if tag == 'svg' and 'images per replica' in attributes['aria-label']]
    assert len(said) == 1 and 'BN: 6.00 ± 0.71 with 2, 4.25 with 4. The paper' in said[0]
    assert all(f'{error} with {batch}' in said[0] for errors in paper.FIGURE_1.values()
               for batch, error in errors.items())
    assert 'The sweep sizes beside Figure 1' in page.text and f"{runs / 'bad'}: 'norm' is missing" in page.text


def test_the_plot_command_draws_the_figures_of_the_page(tmp_path, monkeypatch, capsys):
    runs, out = tmp_path / 'runs', tmp_path / 'figures'
    for seed in (0, 1):
        make_run(runs / str(seed), 'digits_gn_bs2.gin', seed=seed)
    make_sweep(runs, {2: [5.5, 6.5], 4: [4.25, 5.25]})
    make_page(runs)
    text = (tmp_path / 'report.html').read_text()
    names = re.findall(r'aria-label="Figure ([\w-]+)"', text)
    monkeypatch.setattr(sys, 'argv', ['plot', str(runs), str(tmp_path / 'none'), '--report', '--out', str(out)])
    command(plot.main)
    assert 'none: there is no such folder' in capsys.readouterr().out
    assert names == ['batch-sizes-1', 'curves-1-1', 'speed-1-1']
    assert {path.name for path in out.iterdir()} == {name + kind for name in names for kind in ('.png', '.svg')}
    for name in names:
        svg = (out / (name + '.svg')).read_text()
        assert svg.replace(' style="background: white"', '', 1) in text
        image = cv2.imread(str(out / (name + '.png')), cv2.IMREAD_UNCHANGED)
        assert image.shape[1] > 800 and (image[..., 3] == 255).all()
        assert (image[0, 0] == 255).all() and image[..., :3].max(axis=2).min() < 30  # dark ink on white


def test_a_folder_name_stays_text_in_a_picture_and_another_kind_of_file_is_refused(tmp_path, monkeypatch, capsys):
    name = r'$\frac{$'  # would be an error in a formula
    error = make_run(tmp_path / name, 'digits_gn_bs2.gin', done=2)[-1]
    plot.plot_curves([str(tmp_path / name)], str(tmp_path / 'curves.svg'))
    assert f'{name}: validation error {error:.2f} %</text>' in (tmp_path / 'curves.svg').read_text()
    monkeypatch.setattr(sys, 'argv', ['plot', str(tmp_path / name), '--out', str(tmp_path / 'curves.tiff')])
    with pytest.raises(SystemExit) as failed:
        command(plot.main)
    assert failed.value.code == 2 and 'neither in .png nor in .svg' in capsys.readouterr().err


def test_the_command_says_what_it_could_not_read_and_refuses_nothing_at_all(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / 'run', 'digits_gn_bs2.gin', done=2)
    out = tmp_path / 'new' / 'page.html'
    monkeypatch.setattr(sys, 'argv', ['report', str(tmp_path / 'run'), str(tmp_path / 'none'), '--out', str(out)])
    command(report.main)
    assert f'could not be read: {tmp_path / "none"}: there is no such folder' in capsys.readouterr().out
    assert {path.name for path in out.parent.iterdir()} == {'page.html', 'page.md', 'page_figures'}
    for arguments in ([str(tmp_path / 'none')], [str(tmp_path / 'run'), '--out', 'page.md']):
        monkeypatch.setattr(sys, 'argv', ['report', *arguments])
        with pytest.raises(SystemExit) as failed:
            command(report.main)
        assert failed.value.code == 2 and capsys.readouterr().err.count('\n') == 1


@pytest.mark.slow
def test_a_browser_without_network_shows_the_runs_as_they_were_trained(tmp_path):
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if chromium is None:
        pytest.skip('no Chromium: apt install chromium')

    def dom(url):
        """The page after it has been loaded; anything that the console says fails."""
        done = subprocess.run(
            [chromium, '--headless', '--no-sandbox', '--disable-gpu', '--host-resolver-rules=MAP * ~NOTFOUND',
             '--enable-logging=stderr', f'--user-data-dir={tmp_path / "profile"}', '--dump-dom', url],
            capture_output=True, text=True, timeout=120)
        assert done.returncode == 0
        assert not [line for line in done.stderr.splitlines() if 'CONSOLE' in line]
        return Page(done.stdout)

    for seed in (0, 1):
        subprocess.run([sys.executable, '-m', 'gn_gluon.train', '--gin_file', 'gin/digits_gn_bs2.gin', '--workdir',
                        str(tmp_path / 'runs' / str(seed)), '--gin_bindings', 'train.num_epochs = 6', '--gin_bindings',
                        f'train.seed = {seed}'], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([sys.executable, '-m', 'gn_gluon.report', str(tmp_path / 'runs'), '--out',
                    str(tmp_path / 'report.html')], cwd=ROOT, check=True)
    page = dom(f'file://{tmp_path}/report.html')
    for seed in (0, 1):
        with open(tmp_path / 'runs' / str(seed) / 'metrics.jsonl') as file:
            rows = [json.loads(line) for line in file]
        errors = [row['top1_error'] for row in rows if row['split'] == 'validation']
        row = page.tables['All runs'][str(seed)]
        assert len(errors) == 6 and row['error [%]'] == f'{median5(errors):.2f}'
        assert row['validation loss'] == f"{rows[-1]['loss']:.4f}"

    # However narrow the window, only the boxes of tables and figures scroll sideways.
    text = (tmp_path / 'report.html').read_text()
    for width in (400, 1400):
        (tmp_path / 'frame.html').write_text(
            f'<iframe style="width: {width}px" srcdoc="{html.escape(text)}" onload="const page = '
            'this.contentDocument.documentElement; document.body.dataset.hidden = page.scrollWidth - page.clientWidth">'
            '</iframe>')
        body = next(attributes for tag, attributes in dom(f'file://{tmp_path}/frame.html').elements if tag == 'body')
        assert body['data-hidden'] == '0'
