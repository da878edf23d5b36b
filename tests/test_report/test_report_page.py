"""The page of `tools/report.py`: whole in itself, safe, and as a browser shows it."""

import json
import re
import shlex
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from PIL import Image

from ptqsam.cli import parse_args
from ptqsam.report.page import build
from ptqsam.report.page.commands import analysis_command, recipe_file, run_command
from ptqsam.report.page.pictures import WIDTH, Album
from ptqsam.report.page.tool import main
from tests.test_report.artefacts import write_artefacts, write_masks
from tests.test_report.browser import look_at
from tests.test_report.helpers import run, write_sweep
from tests.tiny import ROOT

EVIL = '"><img src=x onerror=alert(1)><script>alert(2)</script>{{ 7 * 7 }}'


class Reader(HTMLParser):
    """Tags of a page, and whether they are closed in order."""

    VOID = {'meta', 'link', 'img', 'input', 'br', 'hr', 'line', 'rect', 'circle', 'polyline', 'polygon'}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID or (tag in ('rect', 'circle') and not self.get_starttag_text().endswith('/>')):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f'</{tag}> closes <{self.open[-1:]}>'
        self.open.pop()


@pytest.fixture(scope='module')
def sweep(tmp_path_factory):
    records = [
        run(value / 100, 0.5, bits, recipe=recipe, model=model, seed=seed, name=f'{model}/{recipe}_{bits}-{seed}')
        for model in ('oracle_mobile-sam', 'yolox-l_sam-vit-b')
        for recipe, value in (('mse', 9), ('qdrop', 30), ('minmax', 100))
        for bits in ('W4A4', 'W6A6')
        for seed in (0, 1)
    ]
    records.append(run(0.4, 0.5, recipe='brecq', compat=['soft_weights'], name='stamped'))
    records.append(run(recipe='brecq', bits='W6A6', status='failed', error=EVIL, name=EVIL))
    folder = write_sweep(tmp_path_factory.mktemp('report') / 'sweep', records)
    write_artefacts(folder / 'cells' / '0')
    write_masks(folder / 'cells' / '1' / 'masks', names='x" onerror=alert(3) <b>{}')
    (folder / 'sweep.yaml').write_text(f'title: {EVIL}\n')
    assert main([str(folder)]) == 0
    return folder


@pytest.fixture(scope='module')
def text(sweep):
    return (sweep / 'report.html').read_text(encoding='utf-8')


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    """Work dir of a run."""

    def write(**fields):
        folder = tmp_path_factory.mktemp('run')
        (folder / 'result.json').write_text(json.dumps(run(0.2, 0.5, model='oracle_mobile-sam', **fields).result))
        return folder

    return write


def page_of(folder, *options):
    assert main([str(folder), *options]) == 0
    return (folder / 'report.html').read_text(encoding='utf-8')


def test_the_page_is_well_formed_and_needs_nothing_else(text):
    tags = Reader(text).tags
    ids = [attributes['id'] for _, attributes in tags if 'id' in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in tags:
        assert not any(name.startswith('on') for name in attributes), tag
        for name in ('src', 'href', 'xlink:href', 'action', 'poster'):
            target = attributes.get(name, '#results')
            assert target.startswith('data:') or target.removeprefix('#') in ids, f'{tag} {name}={target}'
    assert 'url(' not in text and '@import' not in text
    drawings = re.findall(r'<svg viewBox.*?</svg>', text, re.DOTALL)
    assert len(drawings) > 12
    for drawing in drawings:
        ElementTree.fromstring(drawing)


def test_nothing_from_outside_becomes_part_of_the_page(text):
    assert [tag for tag, _ in Reader(text).tags].count('script') == 1
    assert '<img src=x' not in text and '<script>alert' not in text and '<b>0' not in text
    assert text.count('{{ 7 * 7 }}') >= 3, 'what comes from outside is shown as it is, and is no template'


def test_all_sections_are_there(text):
    for title in (
        *('Accuracy against size', 'All runs', 'Time', 'Masks', 'Quantization error', 'Reconstruction'),
        *('Bimodal integration (BIG)', 'Condition numbers (ACNR)', 'Perceptual clipping (PCC)', 'Channel groups (CAG)'),
        *('Sensitivity', 'Activations and quantizer levels', 'Statistics of activations and weights'),
    ):
        assert re.search(rf'<h[23]>{re.escape(title)}</h', text), title
    assert '[soft_weights]' not in text and 'with published defects: soft_weights' in text
    assert '100.0' in text and '50.0 ± 0.0' not in text


def test_a_browser_shows_it(sweep, tmp_path):
    look = look_at(sweep / 'report.html', tmp_path / 'browser')
    found = look.found
    assert look.console == [] and found['fetched'] == []
    assert found['images'] == 7 and found['broken'] == 0
    assert found['width'] <= found['view'] == 1280
    values = [''] + ['9'] * 8 + ['30'] * 8 + ['40'] + ['100'] * 8
    assert sorted(found['before']) == sorted(values) and found['before'] != values
    # as numbers, not as texts; what is not known stands last in both directions
    assert found['ascending'] == [*values[1:], ''] and found['descending'] == [*values[:0:-1], '']
    assert len(found['filtered']) == 8 and all('qdrop' in name for name in found['filtered'])
    assert len(found['drawings']) > 12 and min(found['drawings']) > 40


def test_a_run_alone(one, capsys):
    folder = one()
    write_artefacts(folder)
    page = page_of(folder)
    assert '1 run, ' in capsys.readouterr().out
    assert '<h2>Masks</h2>' in page and '<h2>All runs</h2>' not in page
    # worst first, as the list says
    assert [int(n) for n in re.findall(r'alt="image (\d)', page)] == [0, 1, 2]
    assert 'exp/mse/w4a4.yaml' in page and 'configs/oracle/oracle_mobile-sam.py' in page


def test_commands_of_a_cell_are_those_it_was_run_with():
    words = ('my.py', 'mine.yaml', '--eval-fp', '--limit', '3', '--quant-options', 'calibration.num_images=1')
    record = run(0.2, words=words, seed=4)
    assert shlex.split(run_command(record)) == ['python', 'tools/test_quant.py', *words]
    analysis = shlex.split(analysis_command(record))
    assert analysis[:4] == ['python', 'tools/analyze.py', 'my.py', 'mine.yaml']
    assert analysis[4:6] == ['--quant-options', 'calibration.num_images=1'] and '--limit' not in analysis


def test_commands_are_those_of_the_run():
    record = run(0.2, model='oracle_mobile-sam', seed=3, options={'calibration.num_images': 4, 'cfg:model.a': [1, 2]})
    words = shlex.split(run_command(record, '--limit', '5'))
    args = parse_args(words[2:])
    assert args.quant_options == {'calibration.num_images': 4} and args.cfg_options == {'model.a': [1, 2]}
    assert args.seed == 3 and args.limit == 5
    assert (ROOT / args.model_config).is_file() and (ROOT / args.quant_config).is_file()
    cag = run(0.2, recipe='saq_ablation_stage')
    cag.result['quant'] = 'saq_ablation_stage'
    assert recipe_file(cag) == 'exp/saq_ablation/stage.yaml'
    assert recipe_file(run(recipe='of_mine')) == 'of_mine'


def test_what_is_missing_is_left_out_or_says_how_it_is_made(one):
    folder = one()
    (folder / 'packed').mkdir()
    page = page_of(folder)
    assert 'This run has no masks/index.json yet. It is made by' in page and f'--show-dir {folder}/masks' in page
    # the command leaves the result alone that it stands below
    assert f'--load {folder}/packed' in page and f'--work-dir {folder}/again' in page
    assert 'tools/analyze.py' in page
    for title in ('Reconstruction', 'Channel groups', 'Condition numbers'):
        assert f'<h2>{title}' not in page


@pytest.mark.parametrize('content', [b'', b'\xff\xfe', b'{"a": 1}', b'[1]', b'path,role\n1', b'null'])
def test_damaged_files_cost_their_sections_only(one, content):
    folder = one()
    write_artefacts(folder)
    analysis = (f'analysis/{name}' for name in ('channel_groups.json', 'histograms.json', 'sensitivity.csv'))
    names = ('summary.csv', 'big.json', 'clipping.csv', 'masks/index.json', *analysis)
    for name in names:
        (folder / name).write_bytes(content)
    page = page_of(folder)
    assert '<h2>Condition numbers (ACNR)</h2>' in page
    for name in names:
        line = re.search(rf'<p>(analysis/|masks/)?{name.rpartition("/")[2]} .*</p>', page)
        assert line and 'Traceback' not in line[0]


def test_a_list_of_pictures_reads_no_other_folder(one):
    folder = one()
    write_masks(folder / 'masks')
    Image.new('RGB', (8, 8)).save(folder / 'secret.jpg')
    entry = dict(file='../secret.jpg', image='a', fp_iou=0.1, objects=1, worst=0.1)
    (folder / 'masks' / 'index.json').write_text(json.dumps([entry]))
    page = page_of(folder)
    assert '<img' not in page and 'secret.jpg cannot be read' in page


def test_pictures_are_bounded(tmp_path):
    write_masks(tmp_path / 'masks', count=6)
    pictures = sorted((tmp_path / 'masks').glob('*.jpg'))
    album = Album(1 << 20, 6)
    picture = album.add(pictures[0], 'a')
    assert picture.width == WIDTH and picture.height == round(40 * WIDTH / 1500)
    size = len(picture.uri)
    album = Album(int(size * 3.5), 6)
    album.divide(2)
    assert [album.add(path, 'a') is not None for path in pictures[:3]] == [True, False, False]
    # what one run did not use is there for the others
    album.divide(1)
    assert [album.add(path, 'a') is not None for path in pictures[3:]] == [True, True, False]
    assert album.left_out == 3


def test_a_full_page_says_how_to_see_the_rest(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(build, 'DETAILS', 1)
    assert main([str(sweep), '--output', str(tmp_path / 'page.html')]) == 0
    page = (tmp_path / 'page.html').read_text()
    assert page.count('Left out for the size of this page') == 25 and page.count('<h3>Metrics</h3>') == 1
    assert f'tools/report.py {sweep}/cells/1' in page


def test_tables_on_the_console(sweep, capsys):
    before = (sweep / 'report.html').stat().st_mtime_ns
    assert main([str(sweep), '--markdown']) == 0
    assert capsys.readouterr().out.startswith('| detector | recipe | MobileSAM FP | W4A4 | W6A6 | SAM-B FP |')
    assert main([str(sweep), '--latex']) == 0
    assert r'\begin{tabular}{llrrrrrr}' in capsys.readouterr().out
    assert (sweep / 'report.html').stat().st_mtime_ns == before


def error_of(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1 and len(err.strip().splitlines()) == 1, err
    return code, lines[0]


def test_bad_input_is_one_line(one, tmp_path, capsys):
    code, line = error_of(capsys, tmp_path / 'none')
    assert code == 2 and 'no such folder' in line
    code, line = error_of(capsys, tmp_path)
    assert code == 2 and 'no finished run' in line
    code, line = error_of(capsys, write_sweep(tmp_path / 'empty', []))
    assert code == 2 and 'no cells' in line
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'ledger.sqlite').write_bytes(b'no database at all' * 100)
    code, line = error_of(capsys, tmp_path / 'broken')
    assert code == 3 and 'damaged, or no ledger' in line
    code, line = error_of(capsys, one(), '--output', tmp_path)
    assert code == 2 and 'is a folder' in line


@pytest.mark.parametrize('text', ['', '[]', '{"metrics": {"quant": {}, "fp": null}, "compat": []}', '{"compat": []}'])
def test_a_broken_result_is_named_and_an_earlier_page_stays(one, capsys, text):
    folder = one()
    page = page_of(folder)
    capsys.readouterr()
    (folder / 'result.json').write_text(text)
    code, line = error_of(capsys, folder)
    assert code == 3 and 'result.json: ' in line and 'run again' in line
    assert (folder / 'report.html').read_text() == page and len(list(folder.iterdir())) == 2
