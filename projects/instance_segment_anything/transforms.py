"""Pipeline steps: strict image loading and SAM's resizing."""

from pathlib import Path
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmdet.registry import TRANSFORMS
from PIL import Image

from ptqsam.coco_files import fetch_advice
from ptqsam.errors import AssetError

from .checks import checked_arguments


@TRANSFORMS.register_module()
@checked_arguments('pipeline (LoadImage)')
class LoadImage(LoadImageFromFile):
    """mmcv's loading of an image as BGR, but a file that is not a whole image is named and ends the run.

    Pillow decodes: it refuses a truncated file in every version, where OpenCV's answer depends on the version. The
    pixels are the same.

    Args:
        kwargs: those of mmcv's ``LoadImageFromFile``; ``imdecode_backend`` is 'pillow' unless given.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{'imdecode_backend': 'pillow', **kwargs})

    def transform(self, results: dict) -> dict:
        """Fill ``img`` (H, W, 3) uint8 BGR, ``img_shape``, ``ori_shape``.

        Raises:
            AssetError: the image is missing, cannot be decoded, or has another size than its annotations say.
        """
        path = results['img_path']
        if not Path(path).is_file():
            advice = fetch_advice(path) or 'complete the data set'
            raise AssetError(f'{path}: image is missing, though the annotations name it; {advice}')
        try:
            results = super().transform(results)
        except Exception as error:  # decoders raise all kinds
            reason = ' '.join(str(error).split())
            raise AssetError(f'{path}: cannot decode this image ({reason}); fetch the file again') from None
        said = (results.get('height'), results.get('width'))
        if None not in said and said != results['ori_shape']:
            raise AssetError(
                f'{path}: image is {results["ori_shape"]} (height, width), its annotations say {said}; '
                'image and annotation file do not belong together'
            )
        return results


@TRANSFORMS.register_module()
@checked_arguments('pipeline (ResizeLongestSide)')
class ResizeLongestSide(BaseTransform):
    """Scale an image so that its longer side has ``size`` pixels, exactly as SAM's own preprocessing does.

    Bilinear with antialiasing on 8-bit values, by Pillow; mmcv's ``Resize`` does not antialias. Boxes and masks stay in
    pixels of the original image.

    Args:
        size: longer side of the result in pixels.
    """

    def __init__(self, size: int = 1024) -> None:
        self.size = size

    def transform(self, results: dict) -> dict:
        """Replace ``img`` and set ``img_shape`` (height, width), ``scale_factor`` (width, height), ``keep_ratio``."""
        image = results['img']
        height, width = image.shape[:2]
        scale = self.size / max(height, width)
        new_height, new_width = int(height * scale + 0.5), int(width * scale + 0.5)
        if (new_height, new_width) != (height, width):
            resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
            image = np.array(resized)
        results['img'] = image
        results['img_shape'] = (new_height, new_width)
        results['scale_factor'] = (new_width / width, new_height / height)
        results['keep_ratio'] = True
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(size={self.size})'
