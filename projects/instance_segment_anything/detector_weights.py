"""Weights of detectors out of official files: unwrapped, renamed, complete, and errors that say what a file holds."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ptqsam.download import how_to_get
from ptqsam.errors import AssetError
from ptqsam.weights import Misfits, find_state_dict, load_state_dict, read_checkpoint, tell

from .sam import describe_sam

_PLAIN_ENTRIES = ('state_dict', 'model')
# moving averages of the weights, as mmengine, timm, DINO and DeiT call them; 'ema' of RT-DETR holds them as 'module'
_AVERAGE_ENTRIES = ('ema_state_dict', 'state_dict_ema', 'ema_model', 'model_ema', 'ema')
_NUMBER = re.compile(r'\d+')
# averages among the weights (mmcv's hook for training); counters of batches, of which inference makes nothing
_AVERAGE = re.compile(r'^ema_')
_NOT_WEIGHTS = (_AVERAGE.pattern, r'\.num_batches_tracked$')

# (name, what of the names there must be), the most special first
_FAMILIES = (
    ('H-Deformable-DETR', (r'^transformer\.pos_trans\.', r'^query_embed\.')),
    ('DINO', (r'^transformer\.(tgt_embed|enc_out_class_embed)\.',)),
    ('Deformable DETR', (r'^transformer\.encoder\.layers\.0\.self_attn\.sampling_offsets\.',)),
    ('DETR', (r'^transformer\.encoder\.layers\.0\.self_attn\.in_proj_weight',)),
    ('a DETR of mmdet 2.x', (r'^bbox_head\.transformer\.',)),
    ('DINO of mmdet', (r'^decoder\.ref_point_head\.', r'^query_embedding\.', r'^memory_trans_fc\.')),
    ('Deformable DETR of mmdet', (r'^encoder\.layers\.0\.self_attn\.sampling_offsets\.',)),
    ('DETR of mmdet', (r'^encoder\.layers\.0\.self_attn\.attn\.in_proj_weight',)),
    ('Cascade R-CNN', (r'^roi_head\.bbox_head\.0\.fc_cls\.',)),
    ('Mask R-CNN', (r'^roi_head\.bbox_head\.fc_cls\.', r'^roi_head\.mask_head\.')),
    ('Faster R-CNN', (r'^roi_head\.bbox_head\.fc_cls\.', r'^rpn_head\.')),
    ('Faster R-CNN of mmdet 1.x', (r'^bbox_head\.fc_cls\.', r'^rpn_head\.')),
    ('YOLOX', (r'^bbox_head\.multi_level_conv_obj\.', r'^backbone\.stem\.')),
    ("Megvii's YOLOX", (r'^head\.obj_preds\.', r'^backbone\.backbone\.stem\.')),
)
_YOLOX_STEM = re.compile(r'^backbone\.(backbone\.)?stem\.conv\.conv\.weight$')
_YOLOX_WIDTHS = {16: 'nano', 24: 'tiny', 32: 'S', 48: 'M', 64: 'L', 80: 'X'}
# rows of the weight are classes; with one more for the background where a softmax decides
_CLASSES = re.compile(
    r'^(class_embed(\.0)?|bbox_head\.(cls_branches|multi_level_conv_cls)\.0|head\.cls_preds\.0)\.weight$'
)
_SOFTMAX_CLASSES = re.compile(r'^(roi_head\.bbox_head(\.0)?|bbox_head)\.fc_cls\.weight$')
_USUAL_CLASSES = (80, 91)  # of COCO, counted and by the largest category id: not worth a word

_RESNETS = {(6, True): 50, (23, True): 101, (36, True): 152, (2, False): 18, (6, False): 34}
# kind -> a name that tells it; then the letter by width and blocks of the third stage
_TRANSFORMERS = {
    'FocalNet': r'\.modulation\.f\.weight$',
    'Swin': r'\.relative_position_bias_table$',
}
_LETTERS = {(96, 6): 'T', (96, 18): 'S', (128, 18): 'B', (192, 18): 'L'}  # the same for both
_PATCHES = re.compile(r'(patch_embed|stem)\.proj(ection)?\.weight$')
_THIRD_STAGE = re.compile(r'(?:layers|stages)[._]2\.blocks\.(\d+)\.')
_ADVICE = 'give the weights of that detector (`python tools/download.py --list`) or change model.detector'


def load_detector_weights(model: nn.Module, path: str) -> None:
    """Load a checkpoint into a detector: every tensor of the detector from the file.

    What the user is told in one line each, because the run goes on: names of the file that the detector does not have;
    a prefix ``module.``; moving averages of the weights, which are taken only where the file holds nothing else (as the
    evaluation of mmdet, DETR and DINO does; mmengine's files hold the averages as their ordinary weights).

    Args:
        model: a detector. Its method ``from_official(state)``, if it has one, renames what comes from its authors'
            files, drops what inference does not need and leaves other names alone.
        path: a checkpoint, see ``ptqsam.weights.read_checkpoint``.

    Raises:
        AssetError: missing, damaged or unsafe file, not all weights, or those of another detector (the message says of
            which).
    """
    state = _choose_weights(read_checkpoint(path), path)
    try:
        renamed = model.from_official(state) if hasattr(model, 'from_official') else state
    except (KeyError, IndexError, ValueError, RuntimeError) as error:  # names as expected, with other shapes
        reason = f'cannot be renamed ({" ".join(str(error).split())})'
        raise AssetError(f'{path}: {_of_another(model, state)}; {reason}') from None
    misfits = load_state_dict(model, renamed, str(path), _NOT_WEIGHTS)
    # a ResNet-101 has all that a ResNet-50 needs
    if misfits.missing or misfits.shapes or _further_layers(misfits.unexpected, model):
        raise AssetError(f'{path}: {_say_misfits(model, state, renamed, misfits, path)}')
    if misfits.unexpected:
        tell(f'{path}: {misfits}, of which {type(model).__name__} makes no use')


def _choose_weights(content: Any, path: str) -> dict[str, Tensor]:
    """The weights, or their moving average where there are none; say so where the file holds averages."""
    entries = [key for key, value in content.items() if isinstance(value, Mapping)] if isinstance(content, dict) else []
    averages = [key for key in _AVERAGE_ENTRIES if key in entries]
    plain = not averages or not set(_PLAIN_ENTRIES).isdisjoint(entries)
    state = find_state_dict(content, path, _PLAIN_ENTRIES if plain else (averages[0], 'module'))
    if averages and plain:
        tell(f"{path}: holds weights and their moving average ('{averages[0]}'); the weights are taken")
    elif averages:
        tell(f"{path}: holds only a moving average of the weights ('{averages[0]}'), which is taken")
    elif any(map(_AVERAGE.search, state)):
        tell(f"{path}: holds weights and their moving average (names 'ema_...'); the weights are taken")
    return state


def _further_layers(names: Iterable[str], model: nn.Module) -> bool:
    """Whether names are those of the model but for a number: the file is of a network with more layers."""
    known = {_NUMBER.sub('#', name) for name in model.state_dict()}
    return any(_NUMBER.sub('#', name) in known for name in names)


def _say_misfits(
    model: nn.Module, state: Mapping[str, Tensor], renamed: Mapping[str, Tensor], misfits: Misfits, path: str
) -> str:
    """What is wrong with a file, in names of tensors only where the file is of the same network."""
    kind, weights = describe_detector(state), model.state_dict()
    if describe_detector(renamed) != describe_detector(weights) or weights.keys().isdisjoint(renamed):
        first = [f'; it lacks {name}' for name in misfits.missing] + [f'; {shapes}' for shapes in misfits.shapes]
        return _of_another(model, state) + ''.join(first[:1])
    kind = kind.removeprefix('a ') if kind else type(model).__name__
    if not misfits.shapes and not _further_layers(misfits.unexpected, model):
        return f'is an incomplete {kind}, {misfits}; {how_to_get(path)}'
    return f'holds another {kind} than model.detector is; {_ADVICE}; {misfits}'


def _of_another(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """What a file holds in place of the weights of a model, and what to do."""
    found = describe_detector(state) or f'no detector that is known here (its first tensor: {next(iter(state))})'
    wanted = f'{type(model).__name__}{_describe_backbone(model.state_dict())}'
    return f'holds {found}, which does not fit model.detector ({wanted}); {_ADVICE}'


def describe_detector(state: Mapping[str, Tensor]) -> str | None:
    """Say which detector a state dict belongs to.

    Args:
        state: a state dict, in the names of mmdet or of the authors of a detector.

    Returns:
        For example 'H-Deformable-DETR with ResNet-50', 'YOLOX-L', "SAM 'vit_b'", 'Faster R-CNN with ResNet-101 and 20
        classes', 'a detector with 366 classes', 'ResNet-50 without a detector that is known'; None for anything else.
    """
    sam = describe_sam(state)
    if sam is not None:
        return sam
    family = next((name for name, patterns in _FAMILIES if all(_any(pattern, state) for pattern in patterns)), None)
    backbone, classes = _describe_backbone(state), _count_classes(state)
    if family is None and classes is None:
        return f'{backbone.removeprefix(" with ")} without a detector that is known' if backbone else None
    found = f'{family or "a detector"}{backbone}'
    if classes in (None, *_USUAL_CLASSES):
        return found
    return f'{found} {"and" if " with " in found else "with"} {classes} classes'


def _describe_backbone(state: Mapping[str, Tensor]) -> str:
    """' with ResNet-50', ' with FocalNet-L', '-L' of a YOLOX, or nothing."""
    stem = _first(_YOLOX_STEM, state)
    if stem is not None:
        width = int(stem.shape[0])
        return f'-{_YOLOX_WIDTHS[width]}' if width in _YOLOX_WIDTHS else f' of width {width / 64:g}'
    patches = _first(_PATCHES, state)
    for kind, pattern in _TRANSFORMERS.items():
        if patches is not None and _any(pattern, state):
            size = int(patches.shape[0]), _count(_THIRD_STAGE, state)
            return f' with {kind}-{_LETTERS[size]}' if size in _LETTERS else f' with a {kind} of width {size[0]}'
    blocks = _count(re.compile(r'(?:^|\.)layer3\.(\d+)\.conv1\.weight$'), state)
    if not blocks:
        return ''
    depth = _RESNETS.get((blocks, _any(r'(^|\.)layer3\.0\.conv3\.weight$', state)))
    return f' with ResNet-{depth}' if depth else f' with a ResNet of {blocks} blocks in stage 3'


def _count_classes(state: Mapping[str, Tensor]) -> int | None:
    softmax = _first(_SOFTMAX_CLASSES, state)
    if softmax is not None:
        return int(softmax.shape[0]) - 1
    classes = _first(_CLASSES, state)
    return None if classes is None else int(classes.shape[0])


def _any(pattern: str, names: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for name in names)


def _first(pattern: re.Pattern[str], state: Mapping[str, Tensor]) -> Tensor | None:
    return next((value for name, value in state.items() if pattern.search(name)), None)


def _count(pattern: re.Pattern[str], names: Iterable[str]) -> int:
    """How many different numbers the group of a pattern matches."""
    return len({match[1] for name in names if (match := pattern.search(name))})
