"""The table of a grid: rows, columns, differences to the float model, and what is said of runs that are no result."""

import json

import pytest

from ptqsam.report.grid import grid_table, main, read_cells


@pytest.fixture
def grid(tmp_path):
    def write(name, quant=None, fp=None, compat=(), images=5000, error='', options=''):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / 'options.txt').write_text(f'{options}\n')
        if error:
            (folder / 'error.txt').write_text(f'{error}\n')
        if quant is not None:
            metrics = dict(fp=None if fp is None else dict(segm_mAP=fp), quant=dict(segm_mAP=quant))
            result = dict(metrics=metrics, compat=list(compat), images=images)
            (folder / 'result.json').write_text(json.dumps(result))

    return write


def lines(folder):
    return grid_table(read_cells(folder)).splitlines()


def test_table(grid, tmp_path):
    grid('yolox-l_sam-vit-b/ahcq_sam_w4a4', 0.209, 0.372)
    grid('yolox-l_sam-vit-b/ahcq_sam_w4a8', 0.36, 0.372)
    grid('yolox-l_sam-vit-b/qdrop_w4a4', 0.026)
    grid('yolox-l_sam-vit-h/qdrop_w4a4')
    grid('faster-rcnn_r50_sam-vit-b/qdrop_w4a4', error='error: no weights')
    grid('faster-rcnn_r50_sam-vit-b_best-in-multi/qdrop_w4a4', 0.331, 0.33)
    assert lines(tmp_path) == [
        '| detector | recipe | SAM-B FP | W4A4 | W4A8 | SAM-H FP | W4A4 |',
        '| --- | --- | --- | --- | --- | --- | --- |',
        '| faster-rcnn_r50 | qdrop | - | failed | - | - | - |',
        '| faster-rcnn_r50, best-in-multi | qdrop | 33.0 | 33.1 (+0.1) | - | - | - |',
        '| yolox-l | ahcq_sam | 37.2 | 20.9 (-16.3) | 36.0 (-1.2) | - | - |',
        '| yolox-l | qdrop | - | 2.6 | - | - | unfinished |',
        '',
        '- Mask mAP in percent (difference to FP) on 5000 images.',
        '- Failed: faster-rcnn_r50_sam-vit-b/qdrop_w4a4: error: no weights',
    ]


def test_order_is_that_of_the_papers(grid, tmp_path):
    for detector in ('dino_focalnet-l', 'another', 'hdetr_r50', 'yolox-l', 'faster-rcnn_r50'):
        for sam in ('sam-vit-h', 'mobile-sam', 'sam-vit-b', 'sam-vit-l'):
            for bits in ('w6a6', 'w4a8', 'w4a4'):
                grid(f'{detector}_{sam}/mse_{bits}', 0.2)
    head, _, *rows = [line.strip('| ').split(' | ') for line in lines(tmp_path)]
    sams, bits = ['MobileSAM', 'SAM-B', 'SAM-L', 'SAM-H'], ['W4A4', 'W4A8', 'W6A6']
    assert head == ['detector', 'recipe', *(name for sam in sams for name in (f'{sam} FP', *bits))]
    detectors = ['faster-rcnn_r50', 'yolox-l', 'hdetr_r50', 'dino_focalnet-l', 'another']
    assert [row[0] for row in rows[:5]] == detectors and all(row[3:6] == ['20.0'] * 3 for row in rows[:5])


def test_published_defects_are_stamped(grid, tmp_path):
    grid('yolox-l_sam-vit-b/qdrop_w4a4', 0.133, 0.372, ['keep_drop_prob', 'soft_weights'])
    grid('yolox-l_sam-vit-b/qdrop_w6a6', 0.336, 0.372, ['keep_drop_prob', 'soft_weights'])
    grid('yolox-l_sam-vit-b/mse_w6a6', 0.2, 0.372)
    grid('hdetr_r50_sam-vit-b/qdrop_w4a4', 0.1, 0.372, ['first_images'])
    mse, qdrop, hdetr, _, _, *notes = lines(tmp_path)[2:]
    assert hdetr.endswith('| 10.0 (-27.2) [2] | - |')
    assert mse == '| yolox-l | mse | 37.2 | - | 20.0 (-17.2) |'
    assert qdrop.endswith('| 13.3 (-23.9) [1] | 33.6 (-3.6) [1] |')
    assert notes == [
        '- [1] with published defects: keep_drop_prob, soft_weights',
        '- [2] with published defects: first_images',
    ]


def test_what_cannot_be_compared_is_said(grid, tmp_path):
    grid('yolox-l_sam-vit-b/mse_w4a4', 0.2, images=50, options='--limit 50')
    grid('yolox-l_sam-vit-b/mse_w6a6', 0.2)
    assert lines(tmp_path)[-4:] == [
        '- Mask mAP in percent (difference to FP) on 50 or 5000 images.',
        '- Not all runs were evaluated on the same images: do not compare them.',
        '- Options of 1 of 2 runs: --limit 50',
        '- Options of 1 of 2 runs: none',
    ]


def test_own_names(grid, tmp_path):
    """Pipelines without a SAM in their names, recipes without bits, SAMs of one's own."""
    grid('demo/mse_w4a4', 0.5)
    grid('yolox-l_sam-tiny/my_recipe', 0.25)
    head, _, demo, yolox, *_ = lines(tmp_path)
    assert head == '| detector | recipe | FP | W4A4 | sam-tiny FP |  |'
    assert yolox.endswith('| - | 25.0 |') or demo.endswith('| - | 25.0 |')


def test_command(grid, tmp_path, capsys):
    grid('demo/mse_w4a4', 0.5)
    assert main([str(tmp_path)]) == 0
    assert '| demo | mse | - | 50.0 |' in capsys.readouterr().out


@pytest.mark.parametrize('text', ['', '[]', '{"metrics": {"quant": null}}', '{"metrics": {"quant": {}, "fp": null}}'])
def test_a_broken_result_is_named(grid, tmp_path, capsys, text):
    grid('demo/mse_w4a4')
    (tmp_path / 'demo/mse_w4a4/result.json').write_text(text)
    assert main([str(tmp_path)]) == 3
    assert 'demo/mse_w4a4/result.json: no result of tools/test_quant.py' in capsys.readouterr().err


def test_nothing_there(tmp_path, capsys):
    assert main([str(tmp_path / 'none')]) == 2 and 'no such folder' in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2 and 'no run of exp/run_grid.sh' in capsys.readouterr().err
