"""Values that no option knows, through the command line: one line that names the key, before anything is calibrated."""

import pytest

from ptqsam.cli import main

# with something in every list, so that an option can change one value of it
RECIPE = """
_base_: {recipe}
hooks: [{{type: ConditionNumberReduction}}]
rules:
  - {{match: '*.softmax', quantizer: {{type: AGQ}}}}
  - {{match: '*.patch_embed.*', bits: 8, quantizer: {{type: LSQ}}, observer: {{type: MSE}}}}
reconstruction: {{iters: 2}}
compat: {{first_images: true}}
"""
SWITCH = 'input should be a valid boolean, got '
UNITS = "input should be 'layer', 'module', 'block' or 'stage', got "


@pytest.fixture
def run(tiny, tmp_path, monkeypatch, capsys):
    """Exit code, and what a run of the recipe with options prints."""
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(RECIPE.format(recipe=tiny / 'recipe.yaml'))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('ptqsam.solver.loop.calibrate_activations', lambda *args: pytest.fail('too late'))

    def start(*options):
        code = main([str(tiny / 'tiny.py'), str(recipe), *options])
        return code, capsys.readouterr()

    return start


def refusal(run, *options):
    """The line that a run ends with."""
    code, printed = run(*options)
    (line,) = [line for line in printed.err.split('\n') if 'error' in line]
    assert code == 2 and line.startswith('error: ')
    return line


def test_the_recipe_itself_is_in_order(run):
    code, printed = run('--dry-run')
    assert code == 0 and 'compat  first_images' in printed.out


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('reconstruction.preset', 'slow', "input should be 'paper', 'fast', 'paper_saq' or 'fast_stage', got 'slow'"),
        ('reconstruction.unit', 'per_stage', f"{UNITS}'per_stage'"),
        ('reconstruction.encoder.unit', 'per_stage', f"{UNITS}'per_stage'"),
        ('reconstruction.encoder.enabled', 'CAMS', f"{SWITCH}'CAMS'"),
        ('reconstruction.drift_correction', 'paper', f"{SWITCH}'paper'"),
        ('reconstruction.activations', 'no', f"{SWITCH}'no'"),
        ('reconstruction.cache.store', 'gpu', "input should be 'auto', 'device', 'host' or 'disk', got 'gpu'"),
        ('reconstruction.cache.dtype', 'float16', "input should be 'float32' or 'bfloat16', got 'float16'"),
        ('rules.0.enabled', 'on', f"{SWITCH}'on'"),
        ('compat.first_images', 'yes', f"{SWITCH}'yes'"),
        ('bits.decoder.act', '16', 'input should be less than or equal to 8, got 16'),
    ],
)
def test_unknown_values(run, key, value, message):
    assert f"key '{key}': {message}" in refusal(run, '--quant-options', f'{key}={value}')


@pytest.mark.parametrize('dry_run', [True, False])
@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ('reconstruction.loss.type=ori', "unknown reconstruction loss 'ori' (known: "),
        ('reconstruction.decoder.loss.type=CLM', "unknown reconstruction loss 'CLM' (did you mean 'PromptAware'?)"),
        ('hooks.0.type=ConditionNumber', "unknown solver hook 'ConditionNumber' (did you mean "),
        ('rules.0.quantizer.type=LNQQ', "rule 1 '*.softmax': unknown quantizer 'LNQQ' (did you mean 'LNQ'?)"),
        # of a place that stays in floating point, too
        ('rules.1.quantizer.type=LSQQ', "rule 2 '*.patch_embed.*': unknown quantizer 'LSQQ' (did you mean 'LSQ'?)"),
        ('rules.1.observer.type=MSEE', "rule 2 '*.patch_embed.*': unknown observer 'MSEE' (did you mean 'MSE'?)"),
        ('calibration.observer.act.type=MSEE', "calibration.observer.act: unknown observer 'MSEE' (did you mean "),
        ('calibration.observer.weight.type=no', "calibration.observer.weight: unknown observer 'no' (known: "),
    ],
)
def test_unknown_parts(run, option, message, dry_run):
    assert message in refusal(run, '--quant-options', option, *['--dry-run'] * dry_run)


def test_units_too_small_for_the_prompts(run):
    """The keys that are named are those that help."""
    options = ['--quant-options', 'reconstruction.unit=stage', 'reconstruction.loss.type=PromptAware']
    options += ['reconstruction.decoder.unit=layer']
    line = refusal(run, '--dry-run', *options)
    cures = ['reconstruction.decoder.unit', 'reconstruction.decoder.loss.type=SquaredError']
    assert 'the unit of the decoder is layer' in line and all(cure in line for cure in cures)
    for cure in (f'{cures[0]}=block', cures[1]):
        assert run('--dry-run', *options, cure)[0] == 0
