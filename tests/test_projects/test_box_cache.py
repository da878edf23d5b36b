"""Boxes on disk: computed once, extended by missing images, tied to what made them."""

import json
import threading

import pytest
import torch

from projects.instance_segment_anything import CheckedCocoDataset, cached_boxes, load_boxes
from projects.instance_segment_anything.box_cache import CachedBoxes, _checksum, known_boxes
from ptqsam.errors import AssetError, ConfigError
from tests.processes import finish_processes, start_processes
from tests.test_projects.helpers import instances, make_model, make_sample, random_boxes

CPU = torch.device('cpu')
CATEGORIES = {3: 'cat', 7: 'dog'}


class CountingDetector:
    """Random boxes that depend on the image; remembers which images it saw."""

    def __init__(self, name='a', count=5, labels=(0, 1)):
        self.name, self.count, self.labels = name, count, labels
        self.seen = []
        self.stop_at = None
        self.held = False
        self.model, self.classes = 'm', None

    def identity(self):
        # as in configs: a tuple comes back from a file as a list
        return dict(model=dict(type=self.model, scale=(1, 2)), pipeline=[], weights=self.name)

    def num_classes(self):
        return self.classes

    def detect(self, data_sample, device):
        if data_sample.img_id == self.stop_at:
            raise KeyboardInterrupt
        self.seen.append(data_sample.img_id)
        self.held = True
        count = 0 if data_sample.img_id == 2 else self.count
        scores = torch.rand(count, generator=torch.Generator().manual_seed(data_sample.img_id)).tolist()
        labels = [self.labels[index % len(self.labels)] for index in range(count)]
        return instances(random_boxes(count, 480, 640, seed=data_sample.img_id) + 1 / 3, scores, labels)

    def release(self):
        self.held = False


@pytest.fixture
def dataset(tmp_path):
    """Five images, one object each."""
    write_annotations(tmp_path / 'instances_val.json')
    return open_dataset(tmp_path)


def write_annotations(path):
    content = dict(
        images=[dict(id=i, file_name=f'{i}.png', height=480, width=640) for i in range(1, 6)],
        annotations=[
            dict(
                id=i,
                image_id=i,
                category_id=3,
                bbox=[1, 1, 9, 9],
                area=81,
                iscrowd=0,
                segmentation=[[1, 1, 10, 1, 10, 10]],
            )
            for i in range(1, 6)
        ],
        categories=[dict(id=key, name=name) for key, name in CATEGORIES.items()],
    )
    path.write_text(json.dumps(content))


def open_dataset(folder):
    return CheckedCocoDataset(
        data_root=str(folder),
        ann_file='instances_val.json',
        data_prefix=dict(img=''),
        metainfo=dict(classes=tuple(CATEGORIES.values())),
        test_mode=True,
        pipeline=[],
    )


def test_boxes_come_back_exactly_and_are_computed_once(dataset, tmp_path):
    detector = CountingDetector()
    path = cached_boxes(detector, dataset, tmp_path / 'cache', CPU)
    assert detector.seen == [1, 2, 3, 4, 5]
    assert not detector.held
    assert cached_boxes(detector, dataset, tmp_path / 'cache', CPU) == path
    assert detector.seen == [1, 2, 3, 4, 5]
    cached = CachedBoxes(path)
    for image in range(1, 6):
        expected = CountingDetector().detect(make_sample(img_id=image), CPU)
        expected = expected[expected.scores.argsort(descending=True)]
        found = cached.detect(make_sample(img_id=image), CPU)
        for key in ('bboxes', 'scores', 'labels'):
            assert torch.equal(found[key], expected[key])
            assert found[key].dtype == expected[key].dtype
    assert load_boxes(path)[2][0].shape == (0, 4)


def test_file_holds_coco_results(dataset, tmp_path):
    path = cached_boxes(CountingDetector(), dataset, tmp_path, CPU)
    results = json.loads(path.read_text())['detections']
    assert {result['category_id'] for result in results} == set(CATEGORIES)
    boxes, scores, labels = load_boxes(path)[1]
    x1, y1, x2, y2 = boxes[0].tolist()
    category = list(CATEGORIES)[labels[0]]
    assert results[0] == dict(image_id=1, bbox=[x1, y1, x2 - x1, y2 - y1], score=float(scores[0]), category_id=category)


def test_a_subset_is_extended_not_mistaken_for_the_whole(dataset, tmp_path):
    detector = CountingDetector()
    part = dataset.get_subset([0, 3])
    path = cached_boxes(detector, part, tmp_path, CPU)
    assert detector.seen == [1, 4]
    assert cached_boxes(detector, dataset, tmp_path, CPU) == path
    assert detector.seen == [1, 4, 2, 3, 5]
    other = cached_boxes(CountingDetector(), dataset, tmp_path / 'fresh', CPU)
    extended, whole = load_boxes(path), load_boxes(other)
    assert all((extended[image][0] == whole[image][0]).all() for image in range(1, 6))


def test_low_scores_are_stored_and_very_many_boxes_are_not(dataset, tmp_path):
    path = cached_boxes(CountingDetector(count=1000), dataset, tmp_path, CPU)
    scores = load_boxes(path)[1][1]
    assert len(scores) == 300
    path = cached_boxes(CountingDetector('b', count=200), dataset, tmp_path, CPU)
    scores = load_boxes(path)[3][1]
    assert len(scores) == 200
    assert scores.min() < 0.01


def test_other_detector_or_annotations_have_another_file(dataset, tmp_path):
    path = cached_boxes(CountingDetector('a'), dataset, tmp_path, CPU)
    assert cached_boxes(CountingDetector('b'), dataset, tmp_path, CPU) != path
    file = tmp_path / 'instances_val.json'
    file.write_text(file.read_text() + ' ')
    assert cached_boxes(CountingDetector('a'), dataset, tmp_path, CPU) != path


def changed_score(content):
    content['detections'][0]['score'] = 0.5


def changed_format(content):
    content['format'] = 'other'


def removed_image(content):
    content['images'].pop()


@pytest.mark.parametrize('change', [changed_score, changed_format, removed_image])
def test_tampered_file_is_refused(change, dataset, tmp_path):
    path = cached_boxes(CountingDetector(), dataset, tmp_path, CPU)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    for use in (load_boxes, lambda _: cached_boxes(CountingDetector(), dataset, tmp_path, CPU)):
        with pytest.raises(AssetError, match='delete it') as error:
            use(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize('content', ['', '[]', '{"a": 1}', 'no json'])
def test_foreign_file_is_refused(content, tmp_path):
    (tmp_path / 'boxes.json').write_text(content)
    with pytest.raises(AssetError, match='is no file of cached boxes'):
        load_boxes(tmp_path / 'boxes.json')


def test_file_of_other_boxes_under_this_name_is_refused(dataset, tmp_path):
    path = cached_boxes(CountingDetector('a'), dataset, tmp_path, CPU)
    other = cached_boxes(CountingDetector('b'), dataset, tmp_path, CPU)
    other.replace(path)
    with pytest.raises(AssetError, match='another detector or dataset'):
        cached_boxes(CountingDetector('a'), dataset, tmp_path, CPU)


def test_missing_file_and_missing_image(dataset, tmp_path):
    with pytest.raises(AssetError, match='no such file'):
        load_boxes(tmp_path / 'nowhere.json')
    path = cached_boxes(CountingDetector(), dataset.get_subset([0]), tmp_path, CPU)
    with pytest.raises(AssetError, match='no boxes of image 4'):
        CachedBoxes(path).detect(make_sample(img_id=4), CPU)


def test_boxes_that_are_of_no_use_are_named(dataset, tmp_path, capsys):
    first = cached_boxes(CountingDetector('a'), dataset, tmp_path, CPU)
    assert capsys.readouterr().err.count(str(first)) == 0
    cached_boxes(CountingDetector('b'), dataset, tmp_path, CPU)
    assert f'{first}: boxes of this detector with other weights or another pipeline; detecting anew' in (
        capsys.readouterr().err
    )
    detector = CountingDetector('a')
    detector.model = 'm with another threshold'
    cached_boxes(detector, dataset, tmp_path, CPU)
    assert (
        f'{first}: boxes of these weights with another config or threshold; detecting anew' in capsys.readouterr().err
    )
    detector = CountingDetector('c')
    detector.model = 'another'
    cached_boxes(detector, dataset, tmp_path, CPU)
    assert 'anew' not in capsys.readouterr().err
    # what is there is used, and nothing is said
    cached_boxes(CountingDetector('a'), dataset, tmp_path, CPU)
    assert 'anew' not in capsys.readouterr().err


def test_boxes_of_an_older_version_are_found_anew(dataset, tmp_path, capsys):
    path = cached_boxes(CountingDetector(), dataset, tmp_path, CPU)
    content = json.loads(path.read_text())
    content['format'] = 'ptqsam boxes 2'
    content['sha256'] = _checksum(content)
    path.write_text(json.dumps(content))
    assert known_boxes(CountingDetector(), dataset, tmp_path) is None
    detector = CountingDetector()
    assert cached_boxes(detector, dataset, tmp_path, CPU) == path
    assert detector.seen == [1, 2, 3, 4, 5]
    assert f'{path}: boxes of an older version of this program; detecting anew' in capsys.readouterr().err


def test_detector_for_other_classes(dataset, tmp_path):
    detector = CountingDetector()
    detector.classes = 80
    with pytest.raises(ConfigError, match=r'knows 80 classes, but .* is read with 2'):
        cached_boxes(detector, dataset, tmp_path, CPU)
    assert detector.seen == []


PROCESS = """
import sys
from pathlib import Path
from projects.instance_segment_anything import cached_boxes, box_cache
from ptqsam.launch import together
from tests.test_projects.test_box_cache import CPU, CountingDetector, open_dataset

box_cache._IMAGES_PER_TURN = 1
detector = CountingDetector()
with together('pytorch'):
    print(cached_boxes(detector, open_dataset(Path(sys.argv[1])), Path(sys.argv[1]) / 'two', CPU), detector.seen)
"""


def test_two_processes_write_the_file_of_one(dataset, tmp_path):
    (tmp_path / 'process.py').write_text(PROCESS)
    one = cached_boxes(CountingDetector(), dataset, tmp_path / 'one', CPU)
    results = finish_processes(start_processes(2, tmp_path, cwd=tmp_path, program=tmp_path / 'process.py'))
    assert [code for code, _, _ in results] == [0, 0], results
    (two,) = (tmp_path / 'two').iterdir()
    assert [out for _, out, _ in results] == [f'{two} [1, 3, 5]\n', f'{two} [2, 4]\n']
    assert two.read_bytes() == one.read_bytes()


def test_detector_with_more_classes_than_the_dataset(dataset, tmp_path):
    with pytest.raises(ConfigError, match='found class 5, but the dataset has 2'):
        cached_boxes(CountingDetector(labels=(0, 5)), dataset, tmp_path, CPU)
    assert not list(tmp_path.glob('boxes_*'))


class Broken(CountingDetector):
    def detect(self, data_sample, device):
        if data_sample.img_id == 3:
            raise AssetError('3.png: cannot decode this image')
        return super().detect(data_sample, device)


def test_what_was_found_before_a_failure_is_kept(dataset, tmp_path):
    detector = Broken()
    with pytest.raises(AssetError, match=r'3\.png'):
        cached_boxes(detector, dataset, tmp_path / 'cache', CPU)
    assert not detector.held
    (file,) = (tmp_path / 'cache').iterdir()
    assert set(load_boxes(file)) == {1, 2}


def test_an_interruption_costs_nothing_that_was_found(dataset, tmp_path):
    detector = CountingDetector()
    detector.stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        cached_boxes(detector, dataset, tmp_path / 'cache', CPU)
    again = CountingDetector()
    path = cached_boxes(again, dataset, tmp_path / 'cache', CPU)
    assert again.seen == [4, 5]
    whole = cached_boxes(CountingDetector(), dataset, tmp_path / 'fresh', CPU)
    assert path.read_text() == whole.read_text()


def test_boxes_are_written_in_between(dataset, tmp_path, monkeypatch):
    """What a killed process leaves: nothing of the end of the work is done."""
    for name in ('_SAVE_EVERY', '_WORK_PER_WRITE'):
        monkeypatch.setattr(f'projects.instance_segment_anything.box_cache.{name}', 0.0)
    written = []

    class Watching(CountingDetector):
        def detect(self, data_sample, device):
            written.append([set(load_boxes(file)) for file in tmp_path.glob('boxes_*')])
            return super().detect(data_sample, device)

    cached_boxes(Watching(), dataset, tmp_path, CPU)
    assert written == [[], [{1}], [{1, 2}], [{1, 2, 3}], [{1, 2, 3, 4}]]


def test_another_image_folder_has_another_file(dataset, tmp_path):
    path = cached_boxes(CountingDetector(), dataset, tmp_path, CPU)
    dataset.data_prefix = dict(img=str(tmp_path / 'blurred'))
    assert cached_boxes(CountingDetector(), dataset, tmp_path, CPU) != path


def test_an_image_of_another_size_is_looked_at_again(dataset, tmp_path):
    for number in range(1, 6):
        (tmp_path / f'{number}.png').write_bytes(bytes(100))
    path = cached_boxes(CountingDetector(), dataset, tmp_path / 'cache', CPU)
    (tmp_path / '3.png').write_bytes(bytes(101))
    detector = CountingDetector(count=7)
    assert cached_boxes(detector, dataset, tmp_path / 'cache', CPU) == path
    assert detector.seen == [3]
    boxes = load_boxes(path)
    expected = detector.detect(make_sample(img_id=3), CPU)
    assert len(boxes[3][0]) == len(expected) > 5 >= len(boxes[4][0])
    assert known_boxes(CountingDetector(), dataset, tmp_path / 'cache').keys() == boxes.keys()
    (tmp_path / '3.png').write_bytes(bytes(102))
    assert known_boxes(CountingDetector(), dataset, tmp_path / 'cache') is None


def test_two_processes_that_extend_one_file_lose_nothing(dataset, tmp_path):
    """The second one waits for the first, then adds to what that one found, and does not look at its images again."""
    first, second = CountingDetector(), CountingDetector()
    threads = []

    class Starting(CountingDetector):
        def detect(self, data_sample, device):
            if not threads:
                # a lock of a folder counts per opening of it, so that a thread stands for a process
                threads.append(threading.Thread(target=cached_boxes, args=(second, dataset, tmp_path / 'c', CPU)))
                threads[0].start()
            return super().detect(data_sample, device)

    first = Starting()
    path = cached_boxes(first, dataset.get_subset([0, 1]), tmp_path / 'c', CPU)
    threads[0].join()
    assert first.seen == [1, 2] and second.seen == [3, 4, 5]
    assert set(load_boxes(path)) == {1, 2, 3, 4, 5}


def test_unwritable_folder_is_found_before_the_detector_runs(dataset, tmp_path):
    (tmp_path / 'file').touch()
    detector = CountingDetector()
    with pytest.raises(ConfigError, match=r'cannot keep detector boxes here .*; set PTQSAM_CACHE'):
        cached_boxes(detector, dataset, tmp_path / 'file' / 'cache', CPU)
    assert detector.seen == []


def test_options_beyond_what_is_kept(dataset, tmp_path):
    model = make_model(max_boxes=301)
    model.detector = CountingDetector()
    model.detector.from_annotations = False
    for use in (model.attach_boxes, model.count_boxes):
        with pytest.raises(ConfigError, match=r'max_boxes=.*300 or less'):
            use(dataset, tmp_path)
    assert model.detector.seen == []


def test_oracle_boxes_are_attached_once_and_selected(scenes):
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    from tests.conftest import ROOT

    config = Config.fromfile(ROOT / 'configs' / 'demo' / 'demo.py').test_dataloader.dataset
    config.data_root = f'{scenes}/'
    config.pop('type')
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = CheckedCocoDataset(**config)
    model = make_model(max_boxes=3)
    steps = len(dataset.pipeline.transforms)
    model.attach_boxes(dataset, 'unused')
    model.attach_boxes(dataset, 'unused')
    assert len(dataset.pipeline.transforms) == steps + 1
    sample = dataset[0]['data_samples']
    assert torch.equal(sample.proposals.bboxes, sample.gt_instances.bboxes.tensor[:3])
    assert torch.equal(sample.proposals.labels, sample.gt_instances.labels[:3])
