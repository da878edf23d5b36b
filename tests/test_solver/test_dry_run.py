"""The dry run: what it says about rules, sizes and data, and the sums behind its estimates."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from projects.instance_segment_anything import SegmentAnything
from ptqsam.checkpoint import save_packed, structure
from ptqsam.cli import load_model_config, main
from ptqsam.config import Part, load_quant_config, parse_quant_config
from ptqsam.errors import AssetError, ConfigError
from ptqsam.estimate import Machine, Work, measure_machine, measure_work, packed_bytes
from ptqsam.hooks import ConditionNumberReduction, PerceptualClipping
from ptqsam.modules.walk import act_quantizers, quantizers
from ptqsam.reconstruction.cache import ActivationCache
from ptqsam.reconstruction.engine import Sample
from ptqsam.reconstruction.footprint import Step, iteration_steps
from ptqsam.reconstruction.optimise import ERROR_IMAGES
from ptqsam.solver.calibrate import calibrate_weights
from ptqsam.solver.datasets import build_dataset
from ptqsam.solver.dry_run import describe_run
from ptqsam.solver.forecast import Images, box_count, copies_counted, estimate_stages
from ptqsam.solver.freeze import freeze
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.reconstruction_plan import QUANTIZED_COST, STREAM_PASSES, Plan, duration, show
from ptqsam.solver.rules import RuleBook


def describe(folder, limit=None, model=None, **recipe):
    config = load_model_config(str(folder / 'tiny.py'), model or {})
    return describe_run(config, load_quant_config(folder / 'recipe.yaml', recipe), limit)


def test_says_what_a_run_would_do(tiny):
    text = describe(tiny, limit=1)
    assert 'recipe tiny W4A8' in text
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


def described(folder, capsys, *quant_options):
    """Rows and lines of the dry run of a reconstruction, through the command line."""
    recipe = folder / 'reconstructed.yaml'
    recipe.write_text('_base_: recipe.yaml\nreconstruction: {preset: fast, iters: 7, tokens_per_step: 64}\n')
    options = ['--quant-options', *quant_options] if quant_options else []
    assert main([str(folder / 'tiny.py'), str(recipe), '--dry-run', *options]) == 0
    lines = capsys.readouterr().out.split('\n')
    return {line.split()[0]: line.split() for line in lines if line.endswith(' GB')}, lines


def test_a_reconstruction_is_described(tiny, capsys):
    rows, lines = described(tiny, capsys)
    # 2 blocks of attention and MLP, neck, 2 decoder layers of 4, the last attention
    title = 'reconstruct  14 units (unit=module), 7 iterations each, 98 in total; preset fast'
    assert title in lines
    settings = ' '.join(lines[lines.index(title) : lines.index(title) + 5])
    for words in (
        'drop_prob=0.5',
        'tokens_per_step=64',
        'loss=SquaredError',
        'activations=true',
        'b_range=(20.0, 2.0)',
    ):
        assert words in settings
    assert list(rows) == ['calibrate', 'reconstruct', 'evaluate']
    assert rows['reconstruct'][1] == '2' and int(rows['reconstruct'][2]) <= int(rows['calibrate'][2])
    (cache,) = [line for line in lines if 'activation cache' in line]
    assert cache.endswith('(auto)') and 'float32' in cache and 'at most' in cache
    assert not any(line.startswith('missing') for line in lines)


@pytest.mark.parametrize('loss', ['SquaredError', 'PromptAware'])
@pytest.mark.parametrize(('disabled', 'other', 'units'), [('encoder', 'decoder', 3), ('decoder', 'encoder', 2)])
def test_a_part_that_is_not_reconstructed_is_described(disabled, other, units, loss, tiny, capsys):
    words = [f'{disabled}.enabled=False', 'unit=stage', f'loss.type={loss}']
    rows, lines = described(tiny, capsys, *(f'reconstruction.{word}' for word in words))
    start = lines.index(f'reconstruct  {units} units, {7 * units} iterations in total; preset fast')
    found = [line.strip() for line in lines[start + 1 :]]
    assert f'{other}: {units} units (unit=stage), 7 iterations each, loss={loss}, weight_lr=0.1' in found
    assert any(line.startswith(f'{disabled}: not reconstructed; ') for line in found)
    # told for the part already
    assert sum('loss=' in line for line in found) == 1 and rows['reconstruct'][1] == '2'


def test_options_of_a_reconstruction_are_described(tiny, capsys):
    words = ['unit=block', 'preset=paper', 'cache.store=disk', 'tokens_per_step=None', 'max_boxes=1']
    rows, lines = described(tiny, capsys, *(f'reconstruction.{word}' for word in words), 'compat.soft_weights=True')
    assert any('6 units (unit=block), 7 iterations each, 42 in total; preset paper' in line for line in lines)
    assert any('tokens_per_step=all' in line for line in lines)
    assert any(line.endswith('float32, store disk') for line in lines)
    assert rows['reconstruct'][2] == '2', 'one box of each image'
    assert 'compat  soft_weights: published defects; no packed checkpoint is written' in lines


def test_hooks_are_described(tiny, tmp_path, capsys):
    """Their arguments, and the time of one that runs the calibration images itself."""
    recipe = tmp_path / 'hooks.yaml'
    recipe.write_text(
        f'_base_: {tiny / "recipe.yaml"}\n'
        'hooks: [{type: BimodalIntegration}, {type: ConditionNumberReduction, iters: 20}]\n'
        'rules: [{match: "*qkv.input", quantizer: {type: CAG, groups: 8}}]\n'
    )
    assert main([str(tiny / 'tiny.py'), str(recipe), '--dry-run']) == 0
    lines = capsys.readouterr().out.split('\n')
    assert 'hooks   BimodalIntegration, ConditionNumberReduction iters=20' in lines
    assert any('CAG groups=8, 8 bit, MinMax' in line for line in lines)
    rows = [line.split()[:3] for line in lines if line.endswith(' GB')]
    assert [row[0] for row in rows] == ['ConditionNumberReduction', 'calibrate', 'evaluate']
    assert rows[0][1:] == rows[1][1:], 'the same images and boxes'


def test_hooks_cost_their_passes():
    hook = ConditionNumberReduction()
    hook.calibration_bytes = 3 * 10**12
    machine = Machine(flops=1.0, bandwidth=1.0)
    model = SimpleNamespace(options=SimpleNamespace(chunk_size=2), count_boxes=lambda dataset, cache_dir: [1, 3])
    stages = {'calibrate': (Images(Path('x'), None, dataset=[0, 1]), 9)}
    hooks = [hook, PerceptualClipping(passes=3)]
    estimates = estimate_stages(model, machine, stages, Work(7, 0, 0), Work(4, 0, 0), 0, hooks=hooks)
    assert [(one.name, one.seconds) for one in estimates] == [
        ('ConditionNumberReduction', 66),
        ('calibrate', 22),
    ], '2 * 7 + 4 / 2 * 4 seconds per pass'
    assert estimates[0].memory - estimates[1].memory == 3 * 10**12


def test_no_reconstruction_is_not_described(tiny):
    text = describe(tiny)
    assert 'reconstruct' not in text and 'compat' not in text


def test_no_room_for_activations_is_a_line(tiny, capsys, monkeypatch):
    def no_room(*args, **kwargs):
        raise ConfigError('no room for an activation cache; set reconstruction.cache.store')

    monkeypatch.setattr('ptqsam.solver.reconstruction_plan.choose_store', no_room)
    rows, lines = described(tiny, capsys)
    assert 'missing: reconstruction: no room for an activation cache; set reconstruction.cache.store' in lines
    assert any(line.endswith('store nowhere (auto)') for line in lines) and 'reconstruct' in rows


def test_images_without_boxes_are_a_line(tiny, capsys, monkeypatch):
    monkeypatch.setattr('ptqsam.solver.forecast.known_counts', lambda model, images: [0, 0])
    rows, lines = described(tiny, capsys)
    assert any(line.startswith('missing: reconstruction: none of the calibration images has') for line in lines)
    assert 'reconstruct' in rows


def test_settings_are_shown_as_recipes_have_them():
    assert [show(value) for value in (True, None, 0.5, 'x')] == ['true', 'all', '0.5', 'x']
    assert show(Part(type='SquaredError')) == 'SquaredError'
    assert show(Part(type='PromptAware', stage=0)) == 'PromptAware stage=0'


def test_the_cache_is_not_larger_than_told(tiny, tmp_path, monkeypatch, capsys):
    """A real run on the tiny pipeline, beside the estimate of its dry run from meta tensors."""
    told, live, most = [], [], 0

    class Watched(ActivationCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            live.append(self)

        def append(self, tensors):
            nonlocal most
            super().append(tensors)
            most = max(most, sum(cache.nbytes for cache in live))

    def told_bytes(nbytes, *args, **kwargs):
        told.append(nbytes)
        return 'host'

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('ptqsam.solver.reconstruct.ActivationCache', Watched)
    for module in ('reconstruct', 'reconstruction_plan'):
        monkeypatch.setattr(f'ptqsam.solver.{module}.choose_store', told_bytes)
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(f'_base_: {tiny / "recipe.yaml"}\nreconstruction: {{iters: 1, tokens_per_step: 16}}\n')
    for options in (['--dry-run'], ['--limit', '1']):
        assert main([str(tiny / 'tiny.py'), str(recipe), *options]) == 0
    capsys.readouterr()
    dry, real = told
    assert most <= real <= dry <= 3 * most


def test_work_of_an_iteration():
    """Forward and backward pass on the positions of an iteration; inputs need no gradients."""
    recipe = {'algorithm': 'x', 'bits': {'weight': 4, 'act': 8}, 'reconstruction': {'unit': 'layer'}}
    settings = parse_quant_config(recipe, 'test').reconstruction
    with torch.device('meta'):
        model = torch.nn.Sequential(torch.nn.Linear(100, 10)).requires_grad_(False)
        quantize_model(model, RuleBook(parse_quant_config(recipe, 'test')))
        pipeline = SimpleNamespace(encode=lambda image: model(image), decode_logits=lambda embedding, boxes: None)
        samples = [Sample(torch.empty(2000, 100), torch.empty(3, 4))] * 4

        def step(**changes):
            (found,) = iteration_steps(pipeline, model, settings.model_copy(update=changes), samples)
            return found

        one = step(batch_size=1, tokens_per_step=500)
    assert one.unit == '0' and one.weights == 1000
    assert one.work.flops == 2 * 2 * 500 * 100 * 10
    assert step(batch_size=4, tokens_per_step=500).work.flops == one.work.flops, 'positions of all images together'
    assert step(batch_size=2, tokens_per_step=None).work.flops == 8 * one.work.flops
    assert step(batch_size=9, tokens_per_step=None).work.flops == 16 * one.work.flops, 'no more images than there are'
    total = one.total
    assert total.flops == one.work.flops and total.traffic > 2 * one.work.traffic and total.peak > one.work.peak
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


def test_time_of_a_reconstruction():
    steps = [
        Step(name, Work(flops, 0, peak), 0, 5, 'encoder') for name, flops, peak in (('a', 100, 10), ('b', 300, 20))
    ]
    plan = Plan(steps, images=8, boxes=16, cache=0, store='host', problem='')
    machine = Machine(flops=100.0, bandwidth=1e9)
    passes = STREAM_PASSES + 2 * QUANTIZED_COST * ERROR_IMAGES / 8
    assert plan.seconds(machine, 0, 0) == pytest.approx(5 * 4)
    assert plan.seconds(machine, encoder=2, box=0.5) == pytest.approx(20 + passes * (8 * 2 + 16 * 0.5))
    assert plan.peak == steps[1].total.peak


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
