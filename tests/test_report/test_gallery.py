"""Pictures: what is on them is what the models predicted, and says so."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmdet.datasets import CocoDataset
from PIL import Image
from pycocotools import mask as coco_mask

from ptqsam.errors import AssetError
from ptqsam.report import gallery
from ptqsam.report.gallery import CAPTION, GAP, Gallery, Objects

HEIGHT, WIDTH, GREY = 300, 400, 128


def rectangle(left: int, top: int, right: int, bottom: int, shape: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[top:bottom, left:right] = True
    return mask


def rle(mask: np.ndarray) -> dict:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


LEFT, RIGHT = (40, 60, 160, 220), (240, 60, 360, 220)


class Dataset:
    """Grey images with two annotated rectangles each."""

    def __init__(self, folder, count: int = 1, shape: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
        self.shape = shape
        self.paths = [str(folder / f'{index:03d}.png') for index in range(count)]
        for path in self.paths:
            Image.fromarray(np.full((*shape, 3), GREY, np.uint8)).save(path)

    def __len__(self) -> int:
        return len(self.paths)

    def get_data_info(self, index: int) -> dict:
        instances = [dict(bbox=list(b), mask=rle(rectangle(*b, self.shape)), ignore_flag=0) for b in (LEFT, RIGHT)]
        height, width = self.shape
        return dict(img_path=self.paths[index], height=height, width=width, instances=instances)


def sample(path: str, masks: list[np.ndarray], scores=(1.0, 1.0), boxes=(LEFT, RIGHT), encoded: bool = True):
    tensor = torch.from_numpy(np.array(masks).reshape(-1, *(masks[0].shape if masks else (HEIGHT, WIDTH))))
    instances = SimpleNamespace(
        masks=[rle(mask) for mask in masks] if encoded else tensor,
        scores=torch.tensor(scores, dtype=torch.float32),
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
    )
    return SimpleNamespace(img_path=path, pred_instances=instances)


def panels(path, width: int = WIDTH) -> list[np.ndarray]:
    """The panels of a picture, without their captions."""
    picture = np.array(Image.open(path)).astype(int)
    return [picture[CAPTION:, x : x + width] for x in range(0, picture.shape[1], width + GAP)]


def is_tinted(panel: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean over each pixel's channels of the difference from the grey background, at pixels of a mask."""
    return np.abs(panel[mask] - GREY).mean(axis=1) > 15


def test_each_panel_shows_its_masks_in_the_same_colours(tmp_path):
    dataset = Dataset(tmp_path)
    pictures = Gallery(tmp_path / 'show', dataset)
    path = dataset.paths[0]
    float_masks = [rectangle(*LEFT), rectangle(*RIGHT)]
    # quantization has shrunk the left object and moved the right one up
    shrunk, moved = rectangle(80, 100, 120, 180), rectangle(240, 20, 360, 100)
    pictures.add('fp', [sample(path, float_masks)])
    assert not (tmp_path / 'show').exists()
    pictures.add('quant', [sample(path, [shrunk, moved])])
    assert pictures.pictures == [tmp_path / 'show' / '000.jpg']
    truth, float_panel, quantized = panels(pictures.pictures[0])
    assert truth.shape == float_panel.shape == quantized.shape == (HEIGHT, WIDTH, 3)
    inside, outside = rectangle(*LEFT) | rectangle(*RIGHT), ~(rectangle(30, 10, 370, 230))
    for panel in (truth, float_panel):
        assert is_tinted(panel, inside).all()
        assert not is_tinted(panel, outside).any()
    assert is_tinted(quantized, shrunk | moved).all()
    assert not is_tinted(quantized, rectangle(44, 64, 76, 216)).any(), 'the float mask shows in the quantized panel'
    # one colour per object over all panels, another for the other object; at a pixel inside all of its masks
    for x, y in ((100, 140), (300, 90)):
        assert np.ptp([panel[y, x] for panel in (truth, float_panel, quantized)], axis=0).max() <= 3
    assert np.abs(truth[140, 100] - truth[140, 300]).max() > 40


def test_tensors_and_run_lengths_give_the_same_picture(tmp_path):
    dataset = Dataset(tmp_path)
    masks = [rectangle(*LEFT), rectangle(0, 0, 17, 23)]
    files = []
    for encoded in (False, True):
        pictures = Gallery(tmp_path / str(encoded), dataset)
        for what in ('fp', 'quant'):
            pictures.add(what, [sample(dataset.paths[0], masks, encoded=encoded)])
        files.append(pictures.pictures[0].read_bytes())
    assert files[0] == files[1]


def test_real_coco_dataset(scenes, tmp_path):
    annotations = scenes / 'annotations' / 'instances_val.json'
    classes = tuple(one['name'] for one in json.loads(annotations.read_text())['categories'])
    images = next(folder.name for folder in scenes.iterdir() if folder.is_dir() and 'val' in folder.name)
    dataset = CocoDataset(
        ann_file=str(annotations),
        data_prefix=dict(img=str(scenes / images)),
        metainfo=dict(classes=classes),
        test_mode=True,
    )
    info = dataset.get_data_info(0)
    truth = gallery.true_objects(info)
    assert len(truth.masks) == len(info['instances']) > 0
    for mask, (x1, y1, x2, y2) in zip(truth.masks, truth.boxes.tolist(), strict=True):
        assert coco_mask.toBbox(mask).tolist() == [x1, y1, x2 - x1, y2 - y1]
    pictures = Gallery(tmp_path, dataset)
    scores = np.ones(len(truth.masks))
    masks = [coco_mask.decode(mask).astype(bool) for mask in truth.masks]
    pictures.add('quant', [sample(info['img_path'], masks, scores, truth.boxes)])
    assert len(pictures.pictures) == 1


def test_without_a_float_model_there_is_no_panel_for_it(tmp_path):
    dataset = Dataset(tmp_path)
    pictures = Gallery(tmp_path / 'show', dataset)
    pictures.add('quant', [sample(dataset.paths[0], [rectangle(*LEFT), rectangle(*RIGHT)])])
    assert len(panels(pictures.pictures[0])) == 2


def test_no_predictions(tmp_path):
    dataset = Dataset(tmp_path)
    pictures = Gallery(tmp_path / 'show', dataset)
    for what in ('fp', 'quant'):
        pictures.add(what, [sample(dataset.paths[0], [], scores=(), boxes=())])
    truth, float_panel, quantized = panels(pictures.pictures[0])
    everywhere = np.ones((HEIGHT, WIDTH), bool)
    assert is_tinted(truth, rectangle(*LEFT)).all()
    assert not is_tinted(float_panel, everywhere).any()
    assert not is_tinted(quantized, everywhere).any()


def test_an_empty_mask_shows_as_its_box(tmp_path):
    dataset = Dataset(tmp_path)
    pictures = Gallery(tmp_path / 'show', dataset)
    nothing = np.zeros((HEIGHT, WIDTH), bool)
    pictures.add('quant', [sample(dataset.paths[0], [rectangle(*LEFT), nothing])])
    quantized = panels(pictures.pictures[0])[1]
    left, top, right, bottom = RIGHT
    assert not is_tinted(quantized, rectangle(left + 4, top + 4, right - 4, bottom - 4)).any()
    assert is_tinted(quantized, rectangle(left, top, right, top + 1)).all()


@pytest.mark.parametrize('order', [1, -1])
def test_small_objects_lie_on_large_ones(order):
    small, large = rectangle(100, 100, 120, 120), np.ones((HEIGHT, WIDTH), bool)
    masks = [rle(mask) for mask in (small, large)][::order]
    objects = Objects(masks, np.zeros((2, 4)), np.arange(2), 2)
    image = np.full((HEIGHT, WIDTH, 3), GREY, np.uint8)
    picture = gallery.panel(image, objects, np.arange(2)[::order], 'title', 'note')[CAPTION:]
    below = GREY * (1 - gallery.FILL_OPACITY) + np.array(gallery.colour(1)) * gallery.FILL_OPACITY
    above = below * (1 - gallery.FILL_OPACITY) + np.array(gallery.colour(0)) * gallery.FILL_OPACITY
    assert np.abs(picture[110, 110] - above).max() <= 2


def test_weak_boxes_are_left_out_and_counted(tmp_path):
    dataset = Dataset(tmp_path)
    pictures = Gallery(tmp_path / 'show', dataset)
    pictures.add('quant', [sample(dataset.paths[0], [rectangle(*LEFT), rectangle(*RIGHT)], scores=(0.9, 0.2))])
    quantized = panels(pictures.pictures[0])[1]
    assert is_tinted(quantized, rectangle(*LEFT)).all()
    assert not is_tinted(quantized, rectangle(*RIGHT)).any()
    objects = gallery.predicted_objects(sample('', [rectangle(*LEFT)] * 2, scores=(0.9, 0.2)).pred_instances)
    assert gallery.count_of(objects) == '1 of 2 objects (score over 0.3)'


@pytest.mark.parametrize(('number', 'words'), [(0, '0 objects'), (1, '1 object'), (2, '2 objects')])
def test_count_in_words(number, words):
    objects = Objects([rle(rectangle(*LEFT))] * number, np.zeros((number, 4)), np.arange(number), number)
    assert gallery.count_of(objects) == words


def test_chosen_images_are_spread_over_the_dataset(tmp_path):
    dataset = Dataset(tmp_path, count=9)
    pictures = Gallery(tmp_path / 'show', dataset, max_images=3)
    for what in ('fp', 'quant'):
        for path in dataset.paths:
            pictures.add(what, [sample(path, [rectangle(*LEFT), rectangle(*RIGHT)])])
    assert [path.name for path in pictures.pictures] == ['000.jpg', '004.jpg', '008.jpg']


def test_index_names_the_worst_first(tmp_path):
    dataset = Dataset(tmp_path, count=4)
    pictures = Gallery(tmp_path / 'show', dataset)
    whole, half, nothing = rectangle(*LEFT), rectangle(100, 60, 160, 220), np.zeros((HEIGHT, WIDTH), bool)
    for path in dataset.paths[1:]:
        pictures.add('fp', [sample(path, [whole, nothing])])
    pictures.finish()
    assert not (tmp_path / 'show').exists()
    for path, mask in zip(dataset.paths, (whole, half, whole, nothing), strict=True):
        pictures.add('quant', [sample(path, [mask, nothing])])
    pictures.finish()
    index = json.loads((tmp_path / 'show' / 'index.json').read_text())
    rows = [('003', 0.5, 0), ('001', 0.75, 0.5), ('002', 1, 1), ('000', None, None)]
    assert index == [
        dict(file=f'{name}.jpg', image=f'{name}.png', fp_iou=iou, objects=2, worst=worst) for name, iou, worst in rows
    ]
    assert [path.name for path in pictures.pictures] == ['000.jpg', '001.jpg', '002.jpg', '003.jpg']


def test_large_images_are_scaled_down(tmp_path):
    shape = (600, 1280)
    dataset = Dataset(tmp_path, shape=shape)
    pictures = Gallery(tmp_path / 'show', dataset)
    masks = [rectangle(*LEFT, shape), np.zeros(shape, bool)]
    pictures.add('quant', [sample(dataset.paths[0], masks)])
    quantized = panels(pictures.pictures[0], width=640)[1]
    assert quantized.shape == (300, 640, 3)
    half = [side // 2 for side in LEFT]
    assert is_tinted(quantized, rectangle(*half, (300, 640))).mean() > 0.97
    left, top, right, _ = (side // 2 for side in RIGHT)
    assert is_tinted(quantized, rectangle(left, top, right, top + 1, (300, 640))).all(), 'box of the empty mask'


def test_changed_prompt_boxes_are_noticed(tmp_path):
    dataset = Dataset(tmp_path)
    pictures = Gallery(tmp_path / 'show', dataset)
    masks = [rectangle(*LEFT), rectangle(*RIGHT)]
    pictures.add('fp', [sample(dataset.paths[0], masks)])
    with pytest.raises(AssertionError, match='prompt boxes changed'):
        pictures.add('quant', [sample(dataset.paths[0], masks, boxes=(RIGHT, LEFT))])


def test_unreadable_image(tmp_path):
    dataset = Dataset(tmp_path)
    pictures = Gallery(tmp_path / 'show', dataset)
    (tmp_path / '000.png').write_bytes(b'no image')
    with pytest.raises(AssetError, match=r'000\.png: cannot read this image'):
        pictures.add('quant', [sample(dataset.paths[0], [rectangle(*LEFT), rectangle(*RIGHT)])])
    assert not (tmp_path / 'show').exists()


def test_annotations_of_all_formats():
    x1, y1, x2, y2 = LEFT
    polygon = [[x1, y1, x2, y1, x2, y2, x1, y2], [300, 10, 320, 10, 320, 30, 300, 30]]
    uncompressed = dict(size=[HEIGHT, 1], counts=[y1, y2 - y1, HEIGHT - y2])  # one column
    compressed = rle(rectangle(*RIGHT))
    text = dict(compressed, counts=compressed['counts'].decode())
    masks = (polygon, compressed, text)
    instances = [dict(bbox=[0, 0, 1, 1], mask=mask, ignore_flag=0) for mask in masks]
    crowd = dict(bbox=[0, 0, 1, 1], mask=uncompressed, ignore_flag=1)
    unmasked = dict(bbox=[0, 0, 1, 1], ignore_flag=0)
    truth = gallery.true_objects(dict(height=HEIGHT, width=WIDTH, instances=[crowd, *instances, unmasked]))
    expected = (rectangle(*LEFT) | rectangle(300, 10, 320, 30), rectangle(*RIGHT), rectangle(*RIGHT))
    assert truth.total == 3
    for mask, pixels in zip(truth.masks, expected, strict=True):
        assert (coco_mask.decode(mask) == pixels).all()
    column = coco_mask.decode(gallery.annotated_mask(uncompressed, HEIGHT, 1))[:, 0]
    assert np.flatnonzero(column).tolist() == list(range(y1, y2))


def objects_of(*masks: np.ndarray) -> Objects:
    return Objects([rle(mask) for mask in masks], np.zeros((len(masks), 4)), np.arange(len(masks)), len(masks))


def test_ious_by_hand():
    half = rectangle(100, 60, 160, 220)
    nothing = np.zeros((HEIGHT, WIDTH), bool)
    assert gallery.object_ious(objects_of(rectangle(*LEFT)), objects_of(half)) == pytest.approx([0.5])
    assert gallery.object_ious(objects_of(nothing), objects_of(nothing)) == [1]
    first, second = objects_of(half, half, nothing), objects_of(half, nothing, nothing)
    assert gallery.object_ious(first, second) == [1, 0, 1]


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_ious_are_those_of_the_pixels(seed, count):
    a, b = np.random.default_rng(seed).random((2, count, 9, 7)) < 0.4
    union = (a | b).sum(axis=(1, 2))
    expected = np.where(union > 0, (a & b).sum(axis=(1, 2)) / np.maximum(union, 1), 1)
    assert gallery.object_ious(objects_of(*a), objects_of(*b)) == pytest.approx(expected)


def test_ground_truth_has_the_colour_of_its_prompt_box():
    predicted = Objects([], np.array([RIGHT, LEFT], np.float32), np.array([3, 7]), 10)
    boxes = np.array([LEFT, (0, 0, 20, 20), RIGHT], np.float32)
    assert gallery.match_colours(boxes, predicted).tolist() == [7, 11, 3]
    barely = np.array([(140, 60, 260, 220)], np.float32)  # IoU with either box below one half
    assert gallery.match_colours(barely, predicted).tolist() == [10]
    assert gallery.match_colours(boxes[:0], predicted).tolist() == []


def test_neighbouring_colours_differ():
    colours = np.array([gallery.colour(number) for number in range(24)])
    distances = np.abs(colours[:, None] - colours[None]).sum(axis=2) + 1000 * np.eye(24, dtype=int)
    assert distances.min() > 20
    assert np.diagonal(distances, 1).min() > 120
