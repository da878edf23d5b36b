"""Allocations as recipes: globs name what they must and nothing else, and the base recipe's rules stay."""

from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope

from ptqsam.config import load_quant_config
from ptqsam.mixed.recipe import recipe_text, shortest_globs
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.rules import Point, RuleBook, glob_matches
from tests.tiny import ARCH, ROOT

ROLES = ('mlp.lin1.input', 'mlp.lin1.weight', 'encoder.attn.q', 'encoder.attn.softmax')
POINTS = [
    Point(f'image_encoder.blocks.{block}.{role.removeprefix("encoder.")}', role, role.rpartition('.')[2])
    for block in range(3)
    for role in ROLES
]


@given(bits=st.lists(st.integers(2, 4), min_size=len(POINTS), max_size=len(POINTS)), data=st.data())
def test_globs_name_what_they_must_and_nothing_else(bits, data):
    wanted = [point for point, width in zip(POINTS, bits, strict=True) if width == 2]
    harmless = {point.path for point, width in zip(POINTS, bits, strict=True) if width == 3}
    globs = shortest_globs(wanted, POINTS, harmless)
    named = {point.path for point in POINTS if any(glob_matches(glob, point) for glob in globs)}
    paths = {point.path for point in wanted}
    assert paths <= named <= paths | harmless
    assert len(globs) <= len(wanted)


def test_what_belongs_together_is_one_glob():
    lin1 = [point for point in POINTS if point.role.startswith('mlp')]
    assert shortest_globs(lin1[::2], POINTS, ()) == ['role:mlp.lin1.input']
    block = [point for point in POINTS if '.1.' in point.path]
    assert shortest_globs(block, POINTS, ()) == ['image_encoder.blocks.1.*']
    assert shortest_globs(block[:1], POINTS, ()) == ['image_encoder.blocks.1.mlp.lin1.input']


def sam_rules(recipe):
    import projects.instance_segment_anything  # noqa: F401  (registers the model)

    init_default_scope('mmdet')
    rules = RuleBook(load_quant_config(recipe))
    with torch.device('meta'):
        quantize_model(MODELS.build(dict(type='SegmentAnything', image_size=64, arch=ARCH)), rules)
    return rules


@settings(max_examples=4)
@given(seed=st.integers(0, 2**16))
def test_recipe_gives_the_bits_and_keeps_all_else(tmp_path_factory, seed):
    folder = tmp_path_factory.mktemp('recipe')
    base = ROOT / 'exp' / 'ahcq_sam' / 'w4a4.yaml'
    before = sam_rules(base)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 3, (len(before.enabled),), generator=generator).tolist()
    bits = {choice.point.path: (4, 3, 6)[n] for choice, n in zip(before.enabled, drawn, strict=True)}
    path = folder / 'mine.yaml'
    path.write_text(recipe_text(path, base, before.config, before.choices, bits, ['a comment', '']))
    after = sam_rules(path)
    assert {choice.point.path: choice.bits for choice in after.enabled} == bits
    for old, new in zip(before.choices, after.choices, strict=True):
        assert (old.point, old.enabled, old.quantizer, old.observer) == (
            new.point,
            new.enabled,
            new.quantizer,
            new.observer,
        )
    assert after.config.hooks == before.config.hooks and after.config.reconstruction == before.config.reconstruction
    assert after.config.algorithm == f'{folder.name}/mine'
    assert max(map(len, path.read_text().splitlines())) <= 120


def test_nothing_to_say_is_no_rule(tmp_path):
    base = ROOT / 'exp' / 'mse' / 'w4a4.yaml'
    rules = sam_rules(base)
    path = tmp_path / 'same.yaml'
    path.write_text(recipe_text(path, base, rules.config, rules.choices, {c.point.path: 4 for c in rules.enabled}, []))
    assert load_quant_config(path).rules == ()
    assert Path(path).read_text().startswith('_base_: ')
