"""The photographs that scenes are made of: files inside the installed scikit-image package, free of copyright."""

from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from PIL import Image

from ptqsam.errors import AssetError
from ptqsam.fileio import sha256_file


@dataclass(frozen=True)
class Photograph:
    """One bundled file and its part in the data set.

    Args:
        file: name inside ``skimage/data``.
        sha256: expected content; a replaced photograph would silently change every scene.
        split: the only split that uses it, so that train and val share no image content.
        background: whether scenes are built on it; all photographs of a split also serve as cut-outs.
        box: (left, top, right, bottom) in pixels, the part worth using; None means all of it.
    """

    file: str
    sha256: str
    split: str
    background: bool = True
    box: tuple[int, int, int, int] | None = None


# Not skimage.data.<name>(): those functions download when a file is missing. Every licence below is stated in
# scikit-image's documentation: CC0, public domain or no known copyright restrictions.
PHOTOGRAPHS = (
    Photograph('brick.png', '7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf', 'train'),
    Photograph('camera.png', 'b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a', 'train'),
    Photograph('chelsea.png', '596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb', 'train'),
    Photograph('coffee.png', 'cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7', 'train'),
    Photograph('hubble_deep_field.jpg', '3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4', 'train',
               background=False),
    Photograph('retina.jpg', '38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6', 'train',
               background=False, box=(230, 230, 1180, 1180)),  # inside the disc: its rim would be an edge in a cut-out
    Photograph('astronaut.png', '88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5', 'val'),
    Photograph('coins.png', 'f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba', 'val',
               background=False),
    Photograph('grass.png', 'b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89', 'val'),
    Photograph('gravel.png', 'c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12', 'val'),
    Photograph('ihc.png', 'f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef', 'val',
               background=False),
    Photograph('rocket.jpg', 'c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c', 'val'),
)  # fmt: skip


def load_photographs(split: str) -> list[tuple[Photograph, Image.Image]]:
    """Read the photographs of one split from the installed scikit-image; never touches the network.

    Args:
        split: 'train' or 'val'.

    Returns:
        Pairs in the order of ``PHOTOGRAPHS``; images are RGB, cropped to the photograph's ``box``.

    Raises:
        AssetError: a file is not in the installed package or has other content than expected.
    """
    folder = files('skimage.data')
    loaded = []
    for photo in PHOTOGRAPHS:
        if photo.split != split:
            continue
        path = folder.joinpath(photo.file)
        if not path.is_file() or sha256_file(str(path)) != photo.sha256:
            raise AssetError(
                f'{path}: missing or not the photograph that the scenes are made of; '
                'reinstall scikit-image in the version that requirements.txt pins'
            )
        with Image.open(str(path)) as image:
            loaded.append((photo, image.convert('RGB').crop(photo.box or (0, 0, *image.size))))
    return loaded


def tone(image: Image.Image, rng: np.random.Generator, tint: float) -> np.ndarray:
    """Change brightness and colour balance, which turns a few photographs into many surfaces.

    Args:
        image: RGB.
        rng: source of chance.
        tint: largest relative deviation of one channel's gain.

    Returns:
        (H, W, 3) uint8.
    """
    gain = rng.uniform(0.75, 1.25) * rng.uniform(1 - tint, 1 + tint, size=3)
    offset = rng.uniform(-20, 20)
    # a table per channel: integer work per pixel, the same bits on every machine
    table = np.clip(np.rint(np.arange(256)[:, None] * gain + offset), 0, 255).astype(np.uint8)
    return table[np.asarray(image), np.arange(3)]
