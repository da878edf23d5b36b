"""Official detector checkpoints with stand-in weights, and what the original networks compute with them.

Manifests (names, shapes and the rule for the values) and golden intermediate results are looked for in the folder
`PTQSAM_DETECTORS`, by default `../shared/spec/detectors` beside the checkout. Without them the tests that need them are
skipped.
"""

import argparse
import hashlib
import json
import math
import os
import re
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from mmdet.models import DeformableDETR, DETRHead
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor

from tests.test_projects.layouts import Layout
from tests.tiny import ROOT

FOLDER = Path(os.environ.get('PTQSAM_DETECTORS', ROOT.parent / 'shared' / 'spec' / 'detectors'))
needed = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f'no conformance data of detectors in {FOLDER}; set PTQSAM_DETECTORS'
)
# the order of proposals; groups that depend on it; scores that are closer are tied (memory agrees within 1e-5)
TOP, ORDERED, TIE = 'enc/topk_idx', ('dec', 'out', 'final'), 2e-5
# the order of the computation: the first group that fails names the part at fault
GROUPS = ('feat', 'src', 'pos', 'mask', 'memory', 'enc', 'dec', 'out', 'final')
# key, without the number of a level -> largest absolute deviation; the first that matches counts
TOLERANCES = {
    r'/shape$|^mask|topk_idx$|labels$|query$|category_id$': 0,
    r'^feat|^src': 5e-4,
    r'^pos': 1e-5,
    r'^memory': 2e-4,
    r'^enc/|^out/pred_logits': 1e-4,
    r'^dec/(init_)?reference|^out/pred_boxes': 1e-5,
    r'^dec/': 2e-4,
    r'^final/scores': 1e-5,
    r'^final/boxes': 0.01,  # pixels
}


class Official:
    """One detector's conformance data.

    Args:
        name: file name without suffixes.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return json.loads((FOLDER / f'{self.name}.manifest.json').read_text())

    @cached_property
    def golden(self) -> dict[str, np.ndarray]:
        with np.load(FOLDER / f'{self.name}.golden.npz') as arrays:
            return dict(arrays)

    def shapes(self) -> Layout:
        """Of all tensors of the official file."""
        return {name: tuple(shape) for name, shape in self.manifest['tensors'].items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The entry `model` of the official file, with stand-in values; aliases share their tensor."""
        aliases = self.manifest['aliases']
        shapes = {name: shape for name, shape in self.manifest['tensors'].items() if name not in aliases}
        made = {name: self._stand_in(name, shape) for name, shape in shapes.items()}
        return {name: made[aliases.get(name, name)] for name in self.manifest['tensors']}

    def digest(self, state: dict[str, Tensor]) -> str:
        """Checksum of all values, as the manifest has it."""
        sha = hashlib.sha256()
        for name in sorted(set(state) - set(self.manifest['aliases'])):
            sha.update(name.encode())
            sha.update(state[name].numpy())
        return sha.hexdigest()

    def write_checkpoint(self, path: Path) -> None:
        """Write a file as the training script does; its values are checked on the way."""
        state = self.state_dict()
        assert self.digest(state) == self.manifest['weight_digest']['sha256']
        args = argparse.Namespace(lr=2e-4, output_dir='exps', resume='')
        extra = dict(optimizer={'state': {}, 'param_groups': [{'lr': 2e-4}]}, lr_scheduler={'last_epoch': 35})
        torch.save({'model': state, **extra, 'epoch': 35, 'args': args}, path)

    def image(self, case: str) -> Tensor:
        """Normalised input (1, 3, H, W) of a case, padded with zeros."""
        image = torch.zeros(1, 3, *self.golden[f'{case}/batch_shape'])
        height, width = self.golden[f'{case}/img_shape']
        image[0, :, :height, :width] = torch.from_numpy(self.golden[f'{case}/img_q64'] / np.float32(64))
        return image

    def check(self, case: str, group: str, seen: dict[str, np.ndarray]) -> None:
        """Assert that all values of a group are those of the original, each within its tolerance.

        Prints the deviations, for `pytest -s`.
        """
        found, swapped = False, self.swapped(case, seen)
        if swapped and group in ORDERED:
            pytest.skip(f'{swapped} proposals stand in another order here: their scores differ by rounding only')
        for name, golden in self.golden.items():
            key = name.removeprefix(f'{case}/')
            if key == name or not key.startswith(group) or key.endswith(('_gap', '/rows')):
                continue
            if swapped and key == TOP:
                continue
            found = True
            tolerance = next(value for pattern, value in TOLERANCES.items() if re.search(pattern, key))
            ours = np.asarray(seen[key])
            assert ours.shape == golden.shape, f'{name}: {ours.shape}, golden {golden.shape}'
            deviation = np.abs(ours.astype(np.float64) - golden).max()
            print(f'deviation {self.name} {name} {tolerance} {deviation:.3g}')
            assert deviation <= tolerance, f'{name}: {deviation:.3g} from the golden values, allowed {tolerance}'
        # without padding there is no mask
        assert found or not any(key.startswith(group) for key in seen)

    def swapped(self, case: str, seen: dict[str, np.ndarray]) -> int:
        """Proposals that stand elsewhere than in the original, because a tie went the other way.

        Processors round differently, and some scores are closer than that. 0 if all stand where they belong, or if one
        stands where its score has no business, which `check` then reports.
        """
        if (golden := self.golden.get(f'{case}/{TOP}')) is None or TOP not in seen:
            return 0
        ours, scores = np.asarray(seen[TOP]), self.golden[f'{case}/enc/score']
        tied = np.abs(scores[ours] - scores[golden]).max() <= TIE
        return int((ours != golden).sum()) if tied else 0

    def _stand_in(self, name: str, shape: list[int]) -> Tensor:
        z = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        for rule in self.manifest['weight_rule']['rules']:
            if rule['ndim'] in (None, len(shape)) and re.search(rule['pattern'], name):
                if rule['op'] == 'a+b*z':
                    return rule['a'] + rule['b'] * z
                if rule['op'] == 'a+b*abs(z)':
                    return rule['a'] + rule['b'] * z.abs()
                return z * (rule['gain'] * (1 / math.sqrt(math.prod(shape[1:]))))
        raise AssertionError(f'no rule for {name}')


@cache
def build_on_meta(config: str) -> DeformableDETR:
    """A detector by its config, without memory for its weights; not to be changed.

    Args:
        config: path inside `projects/`.
    """
    with DefaultScope.overwrite_default_scope('mmdet'), torch.device('meta'):
        return MODELS.build(Config.fromfile(ROOT / 'projects' / config).model)


def check_layout(config: str, layout: Layout) -> None:
    """Assert that a file with these tensors has every one of a detector, in its shape, and no other.

    Args:
        config: path inside `projects/`.
        layout: official names.
    """
    model = build_on_meta(config)
    renamed = model.from_official({name: torch.empty(shape, device='meta') for name, shape in layout.items()})
    # official batch norms are frozen and count no batches
    own = {name: value for name, value in model.state_dict().items() if 'num_batches' not in name}
    assert {name: value.shape for name, value in renamed.items()} == {name: value.shape for name, value in own.items()}


@torch.no_grad()
def observe(model: DeformableDETR, official: Official, case: str) -> dict[str, np.ndarray]:
    """Run a detector on the image of a case, as it is used, and collect what the golden file holds.

    Args:
        model: with the stand-in weights.
        official: gives the image, and which tokens are compared.
        case: name.

    Returns:
        Arrays by golden key, without the case.
    """
    image = official.image(case)
    meta = dict(img_shape=tuple(map(int, official.golden[f'{case}/img_shape'])), batch_input_shape=image.shape[-2:])
    with _recorded(model) as calls, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # mmdet 3.3 makes calls that torch has deprecated since
        predicted = model.predict(image, [DetDataSample(metainfo=meta)], rescale=False)[0].pred_instances
    seen: dict[str, Any] = {}
    for name, (_, levels) in (('feat', calls['backbone'][0]), ('src', calls['neck'][0])):
        for i, level in enumerate(levels):
            seen |= {
                f'{name}{i}/{key}': value for key, value in _map_summary(level, 6 if name == 'feat' else 4).items()
            }
    for i, (args, encoding) in enumerate(calls['positional_encoding']):
        seen |= {f'pos{i}/tl': encoding[0, :, :3, :3], f'pos{i}/br': encoding[0, :, -3:, -3:]}
        if args[0] is not None:
            seen[f'mask{i}'] = args[0][0]
    memory = calls['encoder'][0][1][0]
    # feature maps of other sizes are to fail by their own comparison
    rows = official.golden[f'{case}/memory/rows'].clip(max=len(memory) - 1)
    seen |= {'memory/values': memory[rows, ::4], 'memory/mean_std_absmax': _moments(memory)}
    logits = calls['bbox_head.cls_branches.6'][0][1][0]
    ranked, order = calls['topk'][0]
    seen |= {'enc/logits_rows': logits[rows], 'enc/score': ranked[0], 'enc/topk_idx': order[0]}
    seen['enc/topk_score'] = ranked[0, order[0]]
    (states, references), (class_logits, boxes) = calls['bbox_head'][0]
    seen |= {'dec/hs_slice': states[:, 0, :24, ::8], 'dec/hs_mean_std': [_moments(state)[:2] for state in states]}
    seen['dec/init_reference'] = references[0][0]
    seen['dec/reference_after_layer'] = torch.stack(tuple(references[1:]))[:, 0, :64]
    if calls['pos_trans_norm']:
        seen['dec/pos_trans_norm_out'] = calls['pos_trans_norm'][0][1][0, :24, ::2]
    if calls['decoder.ref_point_head']:
        seen['dec/query_pos_layer0'] = calls['decoder.ref_point_head'][0][1][0, :24, ::2]
    # the heads of the decoder have the columns of the 80 categories alone; of the others the golden value is taken
    seen['out/pred_logits_91'] = official.golden[f'{case}/out/pred_logits_91'].copy()
    seen['out/pred_logits_91'][:, official.manifest['class_index_80']] = class_logits[-1, 0]
    seen['out/pred_boxes_cxcywh'] = boxes[-1, 0]
    clipped = DETRHead._predict_by_feat_single(model.bbox_head, class_logits[-1, 0], boxes[-1, 0], meta, rescale=False)
    queries = class_logits[-1, 0].sigmoid().flatten().topk(len(predicted)).indices // 80
    return seen | _in_golden_order(official, case, predicted, queries, clipped.bboxes)


@contextmanager
def _recorded(model: DeformableDETR) -> Iterator[dict[str, list[tuple[Any, Any]]]]:
    """Arguments and results of the calls of a detector's parts, and of torch.topk, which chooses the proposals."""
    calls = defaultdict(list)

    def keep(name: str) -> Any:
        return lambda module, args, output: calls[name].append((args, output))

    def topk(values: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = real_topk(values, *args, **kwargs)
        calls['topk'].append((values, result[1]))
        return result

    real_topk = torch.topk
    parts = ('backbone', 'neck', 'positional_encoding', 'encoder', 'pos_trans_norm', 'decoder.ref_point_head')
    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_hook(keep(name))
        for name in (*parts, 'bbox_head', 'bbox_head.cls_branches.6')
        if name in modules
    ]
    with mock.patch.object(torch, 'topk', topk):
        yield calls
    for hook in hooks:
        hook.remove()


def _in_golden_order(
    official: Official, case: str, predicted: Any, queries: Tensor, clipped: Tensor
) -> dict[str, np.ndarray]:
    """Predictions in the golden order of (query, label): scores that are nearly equal may change places."""
    pairs = [tuple(pair) for pair in torch.stack([queries, predicted.labels], 1).tolist()]
    golden = zip(*(official.golden[f'{case}/final/{key}'].tolist() for key in ('query', 'labels')), strict=True)
    order = [pairs.index(pair) if pair in pairs else 0 for pair in golden]
    labels = predicted.labels[order]
    return {
        'final/query': queries[order],
        'final/labels': labels,
        'final/coco_category_id': np.array(official.manifest['class_index_80'])[labels],
        'final/scores': predicted.scores[order],
        'final/boxes_xyxy': predicted.bboxes[order],
        'final/boxes_xyxy_clamped': clipped[order],
    }


def _map_summary(level: Tensor, corner: int) -> dict[str, Any]:
    """What the golden file holds of a feature map (1, C, H, W)."""
    return {
        'shape': level.shape,
        'mean_std_absmax': _moments(level),
        'channel_mean': level[0].mean((1, 2)),
        'tl': level[0, :16, :corner, :corner],
        'br': level[0, -16:, -corner:, -corner:],
    }


def _moments(values: Tensor) -> list[float]:
    values = values.double()
    return [values.mean().item(), values.std(correction=0).item(), values.abs().max().item()]
