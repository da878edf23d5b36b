"""Sensitivity: starting in the middle and switching give the scores of plain forward passes, bit for bit."""

import math
from collections import Counter

import pytest
import torch

from ptqsam.analysis.prefix import place
from ptqsam.analysis.scores import Score, ScoreFile
from ptqsam.analysis.sensitivity import NOBODY, key, measure, missing, reference_logits, total
from ptqsam.config import parse_quant_config
from ptqsam.modules.walk import act_quantizers, quant_ops
from tests.test_analysis.helpers import make_subject
from tests.test_reconstruction.helpers import LEARNED


def all_paths(subject):
    return [*subject.switches.activations, *subject.switches.weights]


@torch.no_grad()
def brute_force(subject, sample, mode, path):
    """Logits of the whole model from the image, with modes and weights set by hand."""
    enabled = mode == 'enabled'
    for quantizer in act_quantizers(subject.model.sam):
        quantizer.mode = 'quantize' if (quantizer.path == path) == enabled else 'off'
    for _, op, quantizer in quant_ops(subject.model.sam):
        plain, hard = subject.switches.weights[quantizer.path]
        op.weight = hard if (quantizer.path == path) == enabled else plain
    return subject.model.decode_logits(subject.model.encode(sample.image), sample.boxes)[0]


def measured(subject, samples, mode, paths, scores, image=0):
    subject.switches.turn_all(on=False)
    reference = reference_logits(subject.model, samples)[image]
    measure(subject, mode, image, samples[image], reference, paths, scores, lambda: None)
    return reference


@pytest.mark.parametrize('mode', ['enabled', 'disabled'])
@pytest.mark.parametrize('arch', ['vit', 'tiny_vit'])
def test_equal_to_the_whole_model_bit_for_bit(arch, mode, tmp_path):
    subject, samples = make_subject(arch)
    # some of every block
    scores, paths = ScoreFile(tmp_path / 's.json', ''), all_paths(subject)[:: 3 if arch == 'vit' else 5]
    reference = measured(subject, samples, mode, [NOBODY, *paths], scores)
    encoder, decoder = subject.segments
    assert len(encoder) > 3 and len(decoder) == 3
    for path in (NOBODY, *paths):
        expected = Score.of(reference, brute_force(subject, samples[0], mode, path))
        assert scores[key('own', mode, 0, path)] == expected, path
    values = {scores[key('own', mode, 0, path)].noise for path in paths}
    assert len(values) > len(paths) / 2, 'quantizers can be told apart'
    nobody = scores[key('own', mode, 0, NOBODY)]
    assert (nobody.sqnr == math.inf and nobody.mean_iou == 1) == (mode == 'enabled')


def test_what_precedes_is_not_computed_again(tmp_path):
    subject, samples = make_subject()
    paths, calls = all_paths(subject), Counter()
    for path, op in subject.switches.ops.items():
        op.register_forward_hook(lambda *_, path=path: calls.update([path]))
    subject.find_segments(samples[0])
    calls.clear()
    measured(subject, samples, 'disabled', paths, ScoreFile(tmp_path / 's.json', ''))
    calls.subtract(dict.fromkeys(calls, len(samples)))  # the float logits
    in_decoder = [path for path in paths if path.startswith('mask_decoder')]
    in_first, in_second = ([p for p in paths if p.startswith(f'image_encoder.blocks.{i}.')] for i in (0, 1))
    # the embedding, every quantizer of the block itself, and one run to go on to the next block
    assert calls[in_first[-1]] == 1 + len(in_first) + 1
    assert calls[in_second[-1]] == 1 + len(in_first) + len(in_second) + 1
    assert len(in_decoder) > 60 and calls[in_second[-1]] < len(in_decoder)


def test_what_is_no_chain_starts_from_the_input(tmp_path):
    rules = [*LEARNED, {'match': ['mask_decoder.output_*', 'mask_decoder.iou_*'], 'enabled': True}]
    observer = {'weight': {'type': 'MinMax'}, 'act': {'type': 'MinMax'}}
    recipe = parse_quant_config(
        dict(algorithm='x', bits={'weight': 3, 'act': 4}, rules=rules, calibration={'observer': observer}), 'test'
    )
    subject, samples = make_subject('vit', recipe)
    paths = [path for path in all_paths(subject) if 'hypernetworks' in path or 'upscaling' in path or 'iou_' in path]
    assert len(paths) > 20
    scores = ScoreFile(tmp_path / 's.json', '')
    reference = measured(subject, samples, 'disabled', paths, scores)
    assert place(paths[0], subject.segments[1]) > 2
    for path in paths:
        assert scores[key('own', 'disabled', 0, path)] == Score.of(
            reference, brute_force(subject, samples[0], 'disabled', path)
        ), path


def test_exact_quantizer_costs_nothing(tmp_path):
    """A weight that lies on its grid, and an activation of which nothing is lost."""
    subject, samples = make_subject()
    path = 'image_encoder.neck.0.weight'
    hard = subject.switches.weights[path][1]
    subject.switches.weights[path] = (hard, hard)
    scores = ScoreFile(tmp_path / 's.json', '')
    measured(subject, samples, 'enabled', [path], scores)
    score = scores[key('own', 'enabled', 0, path)]
    assert score.sqnr == math.inf and score.mean_iou == 1 and score.masks == len(samples[0].boxes)


def test_scores_of_masks_by_hand():
    reference = torch.tensor([[[1.0, -1.0], [2.0, -2.0]], [[-1.0, -1.0], [-1.0, -1.0]], [[3.0, 1.0], [1.0, -1.0]]])
    logits = reference.clone()
    logits[0, 1, 0] = -2.0  # of two pixels one is left
    logits[2, 1, 1] = 1.0  # a fourth pixel beside three
    score = Score.of(reference, logits)
    assert score.masks == 3 and score.iou == pytest.approx(1 / 2 + 1 + 3 / 4)
    assert score.signal == pytest.approx(float(reference.square().sum())) and score.noise == pytest.approx(16 + 4)
    assert score.sqnr == pytest.approx(10 * math.log10(score.signal / 20))
    both = Score.total([score, Score.of(reference, reference)])
    assert both.masks == 6 and both.mean_iou == pytest.approx((2.25 + 3) / 6) and both.noise == score.noise


def test_scores_are_found_again_under_the_same_conditions(tmp_path):
    scores = ScoreFile(tmp_path, 'a')
    score = Score(1 / 3, 0.1, 2.5, 3)
    scores.add(key('own', 'enabled', 1, 'p'), score)
    scores.save()
    again = ScoreFile(tmp_path, 'a')
    assert again.scores == scores.scores and again[key('own', 'enabled', 1, 'p')] == score
    other = ScoreFile(tmp_path, 'b')
    assert not other.scores
    other.save()
    assert ScoreFile(tmp_path, 'a').scores == scores.scores, 'other conditions take nothing away'
    assert total(again, 'own', 'enabled', 2, 'p') == score and total(again, 'own', 'enabled', 1, 'p') is None
    left = missing(again, 'own', ['enabled'], 2, ['p', 'q'])
    assert left == [('enabled', 0, [NOBODY, 'p', 'q']), ('enabled', 1, [NOBODY, 'q'])]
    again.path.write_text('{"conditions": "a", "sco')
    assert not ScoreFile(tmp_path, 'a').scores
