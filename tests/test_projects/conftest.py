"""What the test files of detectors with conformance data share."""

import pytest

from projects.instance_segment_anything.mmdet_detector import MMDetDetector
from tests.test_projects.official import observe


@pytest.fixture(scope='module')
def official_detector(request, tmp_path_factory):
    """The detector CONFIG of a test file, after the real loader has read a file like that of its OFFICIAL."""
    path = tmp_path_factory.mktemp('detector') / 'official.pth'
    request.module.OFFICIAL.write_checkpoint(path)
    detector = MMDetDetector(request.module.CONFIG, str(path))
    detector._build()
    path.unlink()
    yield detector
    detector.release()


@pytest.fixture(scope='module')
def seen(request, official_detector):
    """What it computes in each of the test file's CASES."""
    official = request.module.OFFICIAL
    return {case: observe(official_detector._model, official, case) for case in request.module.CASES}
