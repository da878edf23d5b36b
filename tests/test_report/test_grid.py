"""The table of runs: rows, columns, means over seeds, differences to the float model, and what is said of the rest."""

import re
import shutil
import subprocess

import pytest

from ptqsam.report.grid import bits_label, build_grid
from ptqsam.report.grid_text import latex, latex_text, markdown
from ptqsam.report.published import Source, read_published
from tests.test_report.helpers import run

SOURCE = Source('A paper', 'with D1', {('yolox-l_sam-vit-b', 'qdrop', 'W4A4'): 13.3}, {'yolox-l_sam-vit-b': 37.2})


def lines(*records, published=()):
    return markdown(build_grid(records, published)).splitlines()


def test_table():
    assert lines(
        run(0.209, 0.372, recipe='ahcq_sam'),
        run(0.36, 0.372, 'W4A8', recipe='ahcq_sam'),
        run(0.026, 0.372, recipe='qdrop'),
        run(recipe='qdrop', model='yolox-l_sam-vit-h'),
        run(recipe='qdrop', model='faster-rcnn_r50_sam-vit-b', status='failed', error='no weights', name='x'),
        run(0.331, 0.33, recipe='qdrop', model='faster-rcnn_r50_sam-vit-b_best-in-multi'),
    ) == [
        '| detector | recipe | SAM-B FP | W4A4 | W4A8 | SAM-H FP | W4A4 |',
        '| --- | --- | --- | --- | --- | --- | --- |',
        '| faster-rcnn_r50 | qdrop | - | failed | - | - | - |',
        '| faster-rcnn_r50, best-in-multi | qdrop | 33.0 | 33.1 (+0.1) | - | - | - |',
        '| yolox-l | ahcq_sam | 37.2 | **20.9 (-16.3)** | 36.0 (-1.2) | - | - |',
        '| yolox-l | qdrop | 37.2 | 2.6 (-34.6) | - | - | pending |',
        '',
        '- Mask mAP in percent (difference to FP, the float model) on 5000 images.',
        '- Failed: x: no weights',
        '- Not finished: 1 pending',
    ]


def test_order_is_that_of_the_papers():
    records = [
        run(0.2, model=f'{detector}_{sam}', bits=bits)
        for detector in ('dino_focalnet-l', 'another', 'hdetr_r50', 'yolox-l', 'faster-rcnn_r50')
        for sam in ('sam-vit-h', 'mobile-sam', 'sam-vit-b', 'sam-vit-l')
        for bits in ('W6A6', 'W4A8', 'W4A4')
    ]
    head, _, *rows = [line.strip('| ').split(' | ') for line in lines(*records)]
    sams, bits = ['MobileSAM', 'SAM-B', 'SAM-L', 'SAM-H'], ['W4A4', 'W4A8', 'W6A6']
    assert head == ['detector', 'recipe', *(name for sam in sams for name in (f'{sam} FP', *bits))]
    detectors = ['faster-rcnn_r50', 'yolox-l', 'hdetr_r50', 'dino_focalnet-l', 'another']
    assert [row[0] for row in rows[:5]] == detectors and all(row[3:6] == ['20.0'] * 3 for row in rows[:5])


def test_published_defects_are_stamped_and_never_best():
    stamp = ['keep_drop_prob', 'soft_weights']
    qdrop, mse, adaround, hdetr, _, _, *notes = lines(
        run(0.133, 0.372, recipe='qdrop', compat=stamp),
        run(0.336, 0.372, 'W6A6', recipe='qdrop', compat=stamp),
        run(0.2, 0.372, 'W6A6'),
        run(0.1, 0.372, 'W6A6', recipe='adaround'),
        run(0.1, 0.372, model='hdetr_r50_sam-vit-b', recipe='qdrop', compat=['first_images']),
    )[2:]
    assert hdetr.endswith('| 10.0 (-27.2) [2] | - |')
    assert mse == '| yolox-l | mse | 37.2 | - | **20.0 (-17.2)** |' and '**' not in adaround
    assert qdrop.endswith('| 13.3 (-23.9) [1] | 33.6 (-3.6) [1] |')
    assert notes == [
        '- [1] with published defects: keep_drop_prob, soft_weights',
        '- [2] with published defects: first_images',
    ]


def test_seeds_are_a_mean_with_their_spread():
    row, _, *notes = lines(run(0.20, 0.4, seed=0), run(0.22, 0.4, seed=1), run(0.27, 0.4, seed=2), run(seed=3))[2:]
    # sample standard deviation of 20, 22, 27
    assert row == '| yolox-l | mse | 40.0 | 23.0 ± 3.6 (-17.0) |'
    assert notes[0].endswith('; mean ± sample standard deviation over seeds.')
    assert '- yolox-l sam-vit-b mse W4A4: 3 seeds of 4' in notes and '- Not finished: 1 pending' in notes


def test_equal_values_are_both_best_and_one_alone_is_not():
    first, second, _ = lines(run(0.2001), run(0.2004, recipe='minmax'), run(0.3, bits='W6A6'))[2:5]
    assert '**20.0**' in first and '**20.0**' in second and '| 30.0 |' in first


def test_the_float_model_is_that_of_runs_with_equal_pipeline_options():
    boxes = [{'cfg:model.test_cfg.max_boxes': n, 'calibration.num_images': 4} for n in (50, 100)]
    first, second, third = lines(
        run(0.2, 0.4, options=boxes[0]),
        run(status='failed', error='no', name='x', options=boxes[1]),
        run(status='failed', error='no', name='y', recipe='qdrop', options=boxes[0] | {'calibration.num_images': 8}),
    )[2:5]
    assert first.endswith('| 40.0 | 20.0 (-20.0) |')
    assert second.endswith('| - | failed |') and third.endswith('| 40.0 | failed |')


def test_what_cannot_be_compared_is_said():
    notes = lines(run(0.2, images=50), run(0.2, bits='W6A6'))[4:]
    assert notes == [
        '- Mask mAP in percent (difference to FP, the float model) on 50 or 5000 images.',
        '- Not all runs were evaluated on the same images: do not compare them.',
    ]


def test_options_that_differ_name_the_row():
    options = [{'calibration.num_images': n} for n in (4, 8)]
    first, second = lines(run(0.2, options=options[0]), run(0.3, options=options[1]))[2:4]
    assert '| mse, calibration.num_images=4 |' in first and '| mse, calibration.num_images=8 |' in second


def test_published_values_stand_below_ours():
    ours, published, other, _, *notes = lines(run(0.1, 0.37, recipe='qdrop'), run(0.2, 0.37), published=[SOURCE])[2:]
    assert ours == '| yolox-l | qdrop | 37.0 | 10.0 (-27.0) |' and '| mse |' in other
    assert published == '| yolox-l | published [a] | 37.2 | 13.3 (-23.9) |'
    assert '- [a] as published, A paper: with D1.' in notes
    assert not any('published' in line for line in lines(run(0.1, recipe='brecq'), published=[SOURCE]))


def test_own_names_and_parts():
    """Pipelines without a SAM in their names, SAMs of one's own, parts with other bits."""
    head, *_ = lines(run(0.5, model='demo'), run(0.25, model='yolox-l_sam-tiny'))
    assert head == '| detector | recipe | FP | W4A4 | sam-tiny FP | W4A4 |'
    bits = dict(weight=4, act=4, encoder=dict(weight=4, act=4), decoder=dict(weight=6, act=8))
    assert bits_label(bits) == 'W4A4 (decoder W6A8)'


def test_a_result_without_the_metric_is_a_failure():
    record = run(0.1)
    record.result['metrics']['quant'] = dict(mean_iou=0.5)
    row, _, *notes = lines(record, run(0.1, recipe='qdrop'))[2:4] + lines(record)[3:]
    assert row.endswith('| failed |') and f'- Failed: {record.name}: its result has no segm_mAP' in notes


NASTY = 'a|b & c_d % $x$ #1 {y} ~ ^ \\ <b> "é"'


def test_markdown_cannot_be_broken():
    table = lines(run(0.1, recipe=NASTY))
    assert {len(re.findall(r'(?<!\\)\|', line)) for line in table[:3]} == {5}
    assert '<b>' not in table[2].replace(r'\<b>', '')


@pytest.fixture(scope='module')
def latex_table():
    records = [
        run(0.2, 0.37, recipe='qdrop'),
        run(0.3, 0.37, recipe='qdrop', seed=1),
        run(0.1, 0.37, 'W6A6', recipe=NASTY),
        run(0.1, 0.37, 'W6A6', model='hdetr_r50_sam-vit-l', compat=['soft_weights']),
        run(model='hdetr_r50_sam-vit-l', status='failed', error=NASTY, name=NASTY),
    ]
    return latex(build_grid(records, [SOURCE]), NASTY)


def test_latex_is_balanced_and_its_rows_have_all_columns(latex_table):
    plain = re.sub(r'\\[\\{}&%$#_]', lambda match: '\n' if match[0] == r'\\' else '', latex_table)
    assert plain.count('{') == plain.count('}') and plain.count('$') % 2 == 0
    assert re.findall(r'\\begin\{(\w+\*?)\}', plain) == ['table*', 'tabular', 'minipage']
    columns = re.search(r'\\begin\{tabular\}\{(\w+)\}', plain)[1]
    body = plain.split(r'\toprule')[1].split(r'\bottomrule')[0]
    rows = [row for row in body.split('\n') if '&' in row]
    assert len(rows) == 6 and columns == 'll' + 'r' * 6
    for row in rows:
        spans = sum(int(n) - 1 for n in re.findall(r'\\multicolumn\{(\d+)\}', row))
        assert row.count('&') + spans + 1 == len(columns), row


def test_latex_compiles(latex_table, tmp_path):
    if not (engine := shutil.which('pdflatex')):
        pytest.skip('no pdflatex on PATH')
    lines = (r'\documentclass{article}', r'\usepackage{booktabs}', r'\begin{document}', latex_table, r'\end{document}')
    (tmp_path / 'table.tex').write_text('\n'.join(lines))
    command = [engine, '-interaction=nonstopmode', '-halt-on-error', '-no-shell-escape', 'table.tex']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-2000:]


def test_latex_text():
    assert latex_text('a_b & 5 %') == r'a\_b \& 5 \%'
    assert latex_text('±') == r'$\pm$' and latex_text('\\é') == r'\textbackslash{}?'


def test_shipped_published_values_are_read():
    ahcq, saq, *_ = read_published()
    assert ahcq.values['yolox-l_sam-vit-b', 'ahcq_sam', 'W4A4'] == 20.9 and ahcq.whole['yolox-l_sam-vit-b'] == 37.2
    assert ('dino_focalnet-l_sam-vit-b', 'minmax', 'W4A4') not in saq.values
