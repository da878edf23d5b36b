"""Pictures within the page, as many as its size allows."""

import base64
import io
from pathlib import Path

from PIL import Image

from ptqsam.errors import AssetError
from ptqsam.report.page.blocks import Picture

# pixels; three panels of masks are legible at this width
WIDTH = 1280
JPEG_QUALITY = 80


class Album:
    """Makes pictures part of the page until its limit is reached.

    Args:
        limit: bytes of all pictures.
        most: pictures of masks per run.

    Attributes:
        left_out: pictures for which there was no room.
    """

    def __init__(self, limit: int, most: int) -> None:
        self.most = most
        self.left = limit
        self.share = limit
        self.left_out = 0

    def divide(self, shares: int) -> None:
        """Let the pictures until the next call have one of so many equal shares of what is left."""
        self.share = self.left // max(shares, 1)

    def add(self, path: Path, caption: str) -> Picture | None:
        """A picture, scaled down where it is wide.

        Args:
            path: JPEG or PNG file; photographs are JPEG, drawings PNG.
            caption: what is on it.

        Returns:
            The picture, None if there is no room for it.

        Raises:
            AssetError: it cannot be read.
        """
        try:
            with Image.open(path) as opened:
                drawn = opened.format == 'PNG'
                image = opened.convert('RGB')
        except (OSError, Image.DecompressionBombError) as error:
            raise AssetError(f'{path.name} cannot be read ({" ".join(str(error).split())})') from None
        if image.width > WIDTH:
            image = image.resize((WIDTH, max(1, round(image.height * WIDTH / image.width))), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        if drawn:
            image.quantize(64, dither=Image.Dither.NONE).save(buffer, 'PNG', optimize=True)
        else:
            image.save(buffer, 'JPEG', quality=JPEG_QUALITY, optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
        if len(data) > self.share:
            self.left_out += 1
            return None
        self.share -= len(data)
        self.left -= len(data)
        return Picture(f'data:image/{"png" if drawn else "jpeg"};base64,{data}', image.width, image.height, caption)
