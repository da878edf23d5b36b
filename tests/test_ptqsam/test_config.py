"""The recipe schema: inheritance, overrides, and one clear line for every mistake."""

import pytest

from ptqsam.config import load_quant_config, parse_quant_config
from ptqsam.errors import ConfigError

GOOD = {'algorithm': 'x', 'bits': {'weight': 4, 'act': 8}}


def test_defaults_and_types():
    config = parse_quant_config(GOOD | {'rules': [{'match': '*', 'bits': 6}]}, 'here')
    assert (config.bits.weight, config.bits.act) == (4, 8)
    assert config.calibration.num_images == 32
    assert config.calibration.observer.act.type == 'AvgMinMax'
    assert config.rules[0].bits == 6 and config.rules[0].enabled is None
    assert parse_quant_config(config.plain(), 'again') == config


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'algoritm': 'x'}, "unknown key 'algoritm' (did you mean 'algorithm'?)"),
        ({'calibration': {'num_image': 2}}, "'calibration.num_image' (did you mean 'num_images'?)"),
        (
            {'calibration': {'observer': {'foo': {'type': 'MSE'}}}},
            "'calibration.observer.foo' (known keys: weight, act)",
        ),
        ({'rules': [{'match': '*', 'quantiser': {'type': 'LSQ'}}]}, "'rules.0.quantiser' (did you mean 'quantizer'?)"),
        ({'compat': {'soft_weights': True}}, "unknown key 'compat.soft_weights'"),
        ({'bits': {'weight': 1, 'act': 8}}, "key 'bits.weight': input should be greater than or equal to 2, got 1"),
        ({'bits': {'weight': 4, 'act': 9}}, "key 'bits.act': input should be less than or equal to 8, got 9"),
        ({'bits': {'weight': '4', 'act': 8}}, "key 'bits.weight': input should be a valid integer, got '4'"),
        ({'bits': {'weight': 4.0, 'act': 8}}, "key 'bits.weight'"),
        ({'bits': {'weight': 4}}, "key 'bits.act' is missing"),
        ({'rules': [{'match': '*', 'bits': 16}]}, "key 'rules.0.bits'"),
        ({'rules': {'match': '*'}}, "key 'rules'"),
        ({'calibration': {'num_images': 0}}, "key 'calibration.num_images'"),
    ],
)
def test_mistakes_are_one_clear_line(change, message):
    with pytest.raises(ConfigError) as info:
        parse_quant_config(GOOD | change, 'exp/x.yaml')
    assert str(info.value).startswith('exp/x.yaml: ')
    assert message in str(info.value)
    assert '\n' not in str(info.value)


def test_base_files_and_overrides(tmp_path):
    (tmp_path / 'base.yaml').write_text(
        'algorithm: a\nbits: {weight: 8, act: 8}\ncalibration: {num_images: 5, seed: 3}\n'
    )
    (tmp_path / 'child.yaml').write_text('_base_: base.yaml\nbits: {weight: 4, act: 6}\n')
    config = load_quant_config(tmp_path / 'child.yaml', {'calibration.num_images': 2})
    assert (config.bits.weight, config.bits.act) == (4, 6)
    assert (config.calibration.num_images, config.calibration.seed) == (2, 3)
    (tmp_path / 'delete.yaml').write_text('_base_: base.yaml\ncalibration: {_delete_: true, num_images: 7}\n')
    assert load_quant_config(tmp_path / 'delete.yaml').calibration.seed == 0


def test_override_typo_names_the_key(tmp_path):
    (tmp_path / 'a.yaml').write_text('algorithm: a\nbits: {weight: 8, act: 8}\n')
    with pytest.raises(ConfigError, match=r"with --quant-options: unknown key 'calibration.num_imges' \(did you mean"):
        load_quant_config(tmp_path / 'a.yaml', {'calibration.num_imges': 2})


def test_unreadable_recipes(tmp_path):
    with pytest.raises(ConfigError, match='no such recipe'):
        load_quant_config(tmp_path / 'none.yaml')
    (tmp_path / 'broken.yaml').write_text('bits: {weight: 4\n')
    with pytest.raises(ConfigError, match='not valid YAML'):
        load_quant_config(tmp_path / 'broken.yaml')
    (tmp_path / 'orphan.yaml').write_text('_base_: missing.yaml\nalgorithm: a\n')
    with pytest.raises(ConfigError, match=r'orphan\.yaml'):
        load_quant_config(tmp_path / 'orphan.yaml')
    (tmp_path / 'list.yaml').write_text('- 1\n- 2\n')
    with pytest.raises(ConfigError, match=r'list\.yaml'):
        load_quant_config(tmp_path / 'list.yaml')
