"""Runs that share work give what they would give alone, bit for bit, and say what they did not compute themselves."""

import json

import pytest

from ptqsam.cli import main
from tests.processes import finish_processes, start_processes

# keeps samples, but is searched quickly
SAMPLED = 'calibration: {observer: {act: {type: Percentile}}}\n'
# name -> recipe on top of the tiny one, and what a second run of it takes
RECIPES = {
    'reconstructed': (
        SAMPLED + 'hooks: [{type: BimodalIntegration}]\n'
        "rules: [{match: '*', quantizer: {type: LSQ}}, {match: '*.weight', quantizer: {type: Uniform}},\n"
        "        {match: 'role:*.softmax', quantizer: {type: AGQ}},\n"
        '        {match: role:mlp.lin1.input, quantizer: {type: CAG}}]\n'
        'reconstruction: {iters: 2, max_boxes: 2, tokens_per_step: 64}\n',
        ['fp', 'embeddings', 'statistics', 'ranges', 'weights'],
    ),
    'hooks': (
        'hooks: [{type: ScaleReparameterization}, {type: PerceptualClipping}]\n',
        ['fp', 'statistics', 'embeddings', 'ranges', 'weights'],
    ),
    'decoder': (
        "rules: [{match: 'image_encoder.*', enabled: false}]\n",
        ['fp', 'statistics', 'ranges', 'weights', 'embeddings'],
    ),
}
# of a result, what may differ between equal runs
OWN = ('seconds', 'work_dir', 'peak_memory_mb', 'shared')


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):
    """Runs the tool on a recipe; returns its result, `work_dir` and all."""
    monkeypatch.setenv('PTQSAM_CACHE', str(tmp_path / 'cache'))

    def start(name, recipe, *options):
        path = tmp_path / 'recipe.yaml'
        path.write_text(f'_base_: {tiny / "recipe.yaml"}\n{recipe}')
        work_dir = tmp_path / name
        assert main([str(tiny / 'tiny.py'), str(path), '--work-dir', str(work_dir), *options]) == 0
        return json.loads((work_dir / 'result.json').read_text())

    return start


def assert_same(ours, theirs, folder):
    """Results and all files of two runs."""
    for name, value in theirs.items():
        assert name in OWN or ours[name] == value, name
    a, b = folder / ours['work_dir'], folder / theirs['work_dir']
    files = {
        path.relative_to(b) for pattern in ('packed/*', '*.csv', 'big.json', 'masks/*') for path in b.rglob(pattern)
    }
    assert {path.name for path in files} >= {'model.safetensors', 'manifest.json', 'summary.csv'}
    for path in files:
        assert (a / path).read_bytes() == (b / path).read_bytes(), path


@pytest.mark.parametrize('name', RECIPES)
def test_shared_runs_are_equal_bit_for_bit(name, run, tmp_path):
    recipe, taken = RECIPES[name]
    own = run('own', recipe, '--eval-fp')
    first = run('first', recipe, '--eval-fp', '--share-work')
    second = run('second', recipe, '--eval-fp', '--share-work')
    assert_same(first, own, tmp_path)
    assert_same(second, own, tmp_path)
    assert (own['shared'], second['shared']) == ([], taken)
    assert set(first['shared']) <= {'embeddings'}


def test_other_bits_take_what_does_not_depend_on_them(run, tmp_path):
    bits, masks = 'bits: {weight: 6, act: 6}\n', 'masks'
    own = run('own', SAMPLED + bits, '--show-dir', str(tmp_path / 'own' / masks))
    run('four', SAMPLED, '--share-work', '--show-dir', str(tmp_path / 'four' / masks))
    six = run('six', SAMPLED + bits, '--share-work', '--show-dir', str(tmp_path / 'six' / masks))
    assert_same(six, own, tmp_path)
    assert six['shared'] == ['fp', 'statistics'] and len(list((tmp_path / 'six' / masks).glob('*.jpg'))) == 2
    prompts = ['--limit', '1', '--cfg-options', 'model.test_cfg.max_boxes=2']
    other = run('prompts', SAMPLED, '--eval-fp', '--share-work', *prompts)
    assert other['shared'] == ['embeddings', 'weights'], 'the same images with other boxes'


def test_several_processes_share_all_but_embeddings(run, tiny, tmp_path):
    one = run('one', RECIPES['decoder'][0], '--eval-fp', '--share-work')
    command = [tiny / 'tiny.py', tmp_path / 'recipe.yaml', '--eval-fp', '--share-work', '--launcher', 'pytorch']
    done = finish_processes(start_processes(2, *command, '--work-dir', tmp_path / 'two', cwd=tmp_path))
    assert [code for code, *_ in done] == [0, 0], done
    two = json.loads((tmp_path / 'two/result.json').read_text())
    assert two['metrics'] == one['metrics']
    assert (one['shared'], two['shared']) == (['embeddings'], ['fp', 'weights'])
    assert len(list((tmp_path / 'cache/statistics').iterdir())) == 2, 'sums of two processes have other last bits'
