"""The dry run: what it says about rules, sizes and data, and the sums behind its estimates."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from projects.instance_segment_anything import SegmentAnything
from ptqsam.checkpoint import save_packed, structure
from ptqsam.cli import load_model_config, main
from ptqsam.config import load_quant_config, parse_quant_config
from ptqsam.errors import AssetError
from ptqsam.estimate import Machine, Work, measure_machine, measure_work, packed_bytes
from ptqsam.solver.calibrate import calibrate_weights
from ptqsam.solver.dry_run import Images, box_count, copies_counted, describe_run, duration
from ptqsam.solver.freeze import freeze
from ptqsam.solver.loop import build_dataset
from ptqsam.solver.prepare import act_quantizers, quantize_model, quantizers
from ptqsam.solver.rules import RuleBook


def describe(folder, limit=None, model=None, **recipe):
    config = load_model_config(str(folder / 'tiny.py'), model or {})
    return describe_run(config, load_quant_config(folder / 'recipe.yaml', recipe), limit)


def test_says_what_a_run_would_do(tiny):
    text = describe(tiny, limit=1)
    assert 'recipe tiny, W4A8' in text
    assert 'points are quantized' in text and 'encoder.attn.softmax' in text
    lines = text.split('\n')
    assert any(line.startswith('calibrate  2 of 4 images') for line in lines)
    assert any(line.startswith('evaluate   1 of 2 images') for line in lines)
    rows = {line.split()[0]: line.split() for line in lines if line.endswith(' GB')}
    assert rows['calibrate'][1] == '2' and rows['evaluate'][1] == '1'
    # no more than max_boxes = 4 of an image, and no image without an object
    assert 2 <= int(rows['calibrate'][2]) <= 8
    assert 'missing' not in text and 'at most' not in text


def test_what_is_missing_is_a_line_and_no_error(tiny, capsys):
    options = ['model.sam.checkpoint=/none/sam.pth', 'calib_dataset.ann_file=none.json']
    recipe = tiny / 'recipe.yaml'
    assert main([str(tiny / 'tiny.py'), str(recipe), '--dry-run', '--cfg-options', *options]) == 0
    missing = [line for line in capsys.readouterr().out.split('\n') if line.startswith('missing: ')]
    assert len(missing) == 2
    assert 'none.json' in missing[0] and '/none/sam.pth' in missing[1]


def test_too_few_calibration_images(tiny):
    text = describe(tiny, **{'calibration.num_images': 9})
    assert 'calibrate  9 of 4 images' in text
    assert 'missing: calibration.num_images: 9 wanted' in text


def test_a_recipe_that_cannot_work_is_an_error(tiny, capsys):
    rules = 'rules=[dict(match="nothing")]'
    command = [str(tiny / 'tiny.py'), str(tiny / 'recipe.yaml'), '--dry-run', '--quant-options', rules]
    assert main(command) == 2
    assert capsys.readouterr().err.startswith('error: ')


@pytest.mark.parametrize('bits', [3, 8])
def test_packed_size(bits, tmp_path):
    recipe = parse_quant_config({'algorithm': 'x', 'bits': {'weight': bits, 'act': 8}}, 'test')
    model = SegmentAnything('mobile', 1024).eval()
    with torch.device('meta'):
        planned = SegmentAnything('mobile', 1024)
        quantize_model(planned, RuleBook(recipe))
    before = structure(model)
    quantize_model(model, RuleBook(recipe))
    for quantizer in act_quantizers(model):
        quantizer.load_state_dict(dict(scale=torch.tensor(0.1), zero_point=torch.tensor(3, dtype=torch.int32)))
    calibrate_weights(model)
    freeze(model)
    errors = {q.path: dict(sqnr=23.456789012345678, cosine=0.99876543210987) for q in quantizers(model)}
    size = save_packed(tmp_path, model, before, recipe.plain(), dict(images='0123456789abcdef'), errors)
    assert packed_bytes(planned) == pytest.approx(size, rel=0.03)


def test_work_of_a_matrix_product():
    def forward():
        x = torch.empty(8, 16)
        weight = torch.empty(16, 32)
        product = x @ weight
        del x, weight
        return product.view(4, 64).relu_()

    work = measure_work(forward)
    assert work.flops == 2 * 8 * 16 * 32
    assert work.peak == 4 * (8 * 16 + 16 * 32 + 8 * 32)
    # made, made, product (read and written), relu in place (read and written)
    assert work.traffic == 4 * (2 * (8 * 16 + 16 * 32) + 8 * 32 + 2 * 8 * 32)


def test_memory_is_given_back():
    def forward(steps):
        x = torch.empty(1000)
        for _ in range(steps):
            x = x + 1
        return x

    assert measure_work(lambda: forward(9)).peak == measure_work(lambda: forward(1)).peak == 8000


def test_quantizers_add_their_copies():
    recipe = parse_quant_config({'algorithm': 'x', 'bits': {'weight': 4, 'act': 8}}, 'test')
    with torch.device('meta'):
        model = torch.nn.Sequential(torch.nn.Linear(100, 1)).requires_grad_(False)
        quantize_model(model, RuleBook(recipe))

    def peak():
        x = torch.empty(50, 100, device='meta')
        return measure_work(lambda: model(x)).peak

    plain = peak()
    with copies_counted(model):
        assert peak() == plain + 4 * 50 * 100
    assert peak() == plain


def test_time_of_work():
    assert Machine(flops=100.0, bandwidth=10.0).seconds(Work(flops=200, traffic=30, peak=0)) == 5.0
    machine = measure_machine(torch.device('cpu'), seconds=0.01)
    assert machine.flops > 0 and machine.bandwidth > 0


@pytest.mark.parametrize(('seconds', 'text'), [(0.4, '0 s'), (89, '89 s'), (90, '2 min'), (5400, '1.5 h')])
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.fixture
def images(tiny):
    """The two evaluated images of the tiny pipeline."""
    dataset = build_dataset(load_model_config(str(tiny / 'tiny.py'), {}).test_dataloader.dataset)
    return Images(Path(dataset.ann_file), wanted=None, dataset=dataset)


def model_with(count_boxes):
    return SimpleNamespace(count_boxes=count_boxes)


def test_boxes_that_are_known(images, monkeypatch):
    monkeypatch.setenv('PTQSAM_CACHE', 'the cache')

    def count_boxes(dataset, cache_dir):
        assert dataset is images.dataset and cache_dir == 'the cache'
        return [3, 120]

    assert box_count(model_with(count_boxes), images, 100) == (103, False)
    assert box_count(model_with(count_boxes), images, 16) == (19, False)


def test_boxes_that_are_not_known(images):
    def no_checkpoint(dataset, cache_dir):
        raise AssetError('no weights')

    for count_boxes in (lambda dataset, cache_dir: None, no_checkpoint):
        assert box_count(model_with(count_boxes), images, 100) == (200, True), 'all that there can be'
    model = model_with(None)
    assert box_count(model, Images(images.file, wanted=None), 100) == (None, True), 'the data set is missing'
    assert box_count(model, Images(images.file, wanted=7), 100) == (700, True)
