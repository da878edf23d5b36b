"""One scene: a photograph with cut-outs of other photographs pasted on it, and the exact mask of each."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from scipy import ndimage

from projects.scenes.photographs import Photograph, tone
from projects.scenes.shapes import SHAPES, Outline, random_outline, rasterize

SIZES = ((640, 480), (640, 427), (576, 432), (512, 512), (480, 480), (480, 640), (427, 640))  # width, height
MAX_ENLARGEMENT = 1.61  # of a background; beyond that it looks out of focus
MASK_ALPHA = 128  # a pixel belongs to the object that covers at least half of it

# Sides of equal-area squares, in pixels: COCO's small (< 32), medium (< 96) and large objects.
SIDES = ((16, 32), (32, 96), (96, 240))
SIDE_SHARES = (0.35, 0.4, 0.25)
OBJECTS = (5, 11)  # half open
NEIGHBOUR_PROBABILITY = 0.3  # of aiming at an existing object, so that occlusion is common
ATTEMPTS = 25  # per object, then it is left out

MIN_AREA = 100  # visible pixels
MIN_INSIDE = 0.6  # share of the wanted area that must lie inside the picture
MIN_VISIBLE = 0.5  # share of an object that later objects must leave visible
MIN_CONTRAST = 32  # grey levels between the local mean colours on both sides of the border
MIN_CONTRAST_SHARE = 0.8  # of the border's length
WINDOW = 7  # pixels, local mean
MARGIN = WINDOW // 2 + 1


@dataclass(frozen=True)
class Layer:
    """A pasted cut-out.

    Args:
        category: key of ``SHAPES``.
        left, top: position of the window in the picture, pixels.
        alpha: (h, w) uint8 coverage.
        texture: (h, w, 3) uint8 colours.
    """

    category: str
    left: int
    top: int
    alpha: np.ndarray
    texture: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """(h, w) bool: the pixels of the whole object, whatever covers it later."""
        return self.alpha >= MASK_ALPHA

    @property
    def window(self) -> tuple[slice, slice]:
        """Where the layer lies in the picture."""
        height, width = self.alpha.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


@dataclass
class Scene:
    """A background and its layers in the order of pasting.

    Args:
        background: (H, W, 3) uint8.
        layers: cut-outs, later ones on top.
        image: (H, W, 3) uint8, the composed picture.
        owner: (H, W) int16, index of the visible layer of each pixel, -1 for the background.
    """

    background: np.ndarray
    layers: list[Layer] = field(default_factory=list)
    image: np.ndarray = field(init=False)
    owner: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.image = self.background.copy()
        self.owner = np.full(self.background.shape[:2], -1, np.int16)

    def paste(self, layer: Layer) -> None:
        """Put a layer on top of everything so far."""
        below = self.image[layer.window].astype(np.uint32)
        alpha = layer.alpha[..., None].astype(np.uint32)
        self.image[layer.window] = (below * (255 - alpha) + layer.texture * alpha + 127) // 255
        self.owner[layer.window][layer.mask] = len(self.layers)
        self.layers.append(layer)

    def objects(self) -> Iterator[tuple[str, np.ndarray]]:
        """Category and visible (H, W) bool mask of every layer; the masks are disjoint."""
        for index, layer in enumerate(self.layers):
            yield layer.category, self.owner == index


def compose_scene(photos: list[tuple[Photograph, Image.Image]], rng: np.random.Generator) -> Scene:
    """Make one scene.

    Args:
        photos: material, from :func:`~projects.scenes.photographs.load_photographs`.
        rng: source of chance; its state on entry determines the scene.

    Returns:
        The scene with every kept object pasted.
    """
    chosen, background = _random_background(photos, rng)
    scene = Scene(background)
    material = [image for photo, image in photos if photo is not chosen]
    count = int(rng.integers(*OBJECTS))
    ranges = np.asarray(SIDES)[rng.choice(len(SIDES), count, p=SIDE_SHARES)]
    sides = np.exp(rng.uniform(np.log(ranges[:, 0]), np.log(ranges[:, 1])))
    for side in np.sort(sides)[::-1]:  # small ones last, or large ones would bury them
        category = str(rng.choice(list(SHAPES)))
        for _ in range(ATTEMPTS):
            outline = random_outline(category, side**2, _random_center(scene, rng), rng)
            layer = _cut_out(outline, category, background.shape[:2], material, rng)
            if layer is not None and _fits(scene, layer, side**2):
                scene.paste(layer)
                break
    return scene


def _random_background(
    photos: list[tuple[Photograph, Image.Image]], rng: np.random.Generator
) -> tuple[Photograph, np.ndarray]:
    backgrounds = [pair for pair in photos if pair[0].background]
    photo, image = backgrounds[rng.integers(len(backgrounds))]
    zooms = [(size, max(size[0] / image.width, size[1] / image.height)) for size in SIZES]
    sharp = [(size, zoom) for size, zoom in zooms if zoom <= MAX_ENLARGEMENT]
    size, zoom = sharp[rng.integers(len(sharp))]
    zoom = max(zoom, min(MAX_ENLARGEMENT, zoom * rng.uniform(1.0, 1.3)))
    return photo, tone(_random_crop(image, size, zoom, rng), rng, tint=0.12)


def _random_crop(image: Image.Image, size: tuple[int, int], zoom: float, rng: np.random.Generator) -> Image.Image:
    """A random part of an image, enlarged ``zoom`` times to ``size``, flipped left to right half of the time."""
    width, height = (min(wanted / zoom, have) for wanted, have in zip(size, image.size, strict=True))
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    crop = image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def _random_center(scene: Scene, rng: np.random.Generator) -> tuple[float, float]:
    height, width = scene.owner.shape
    if scene.layers and rng.random() < NEIGHBOUR_PROBABILITY:
        rows, columns = np.nonzero(scene.owner == rng.integers(len(scene.layers)))
        pick = rng.integers(len(rows))
        return float(columns[pick]), float(rows[pick])
    return rng.uniform(0, width), rng.uniform(0, height)


def _cut_out(
    outline: Outline,
    category: str,
    frame: tuple[int, int],
    material: list[Image.Image],
    rng: np.random.Generator,
) -> Layer | None:
    """Fill an outline with a random piece of a random photograph; None where nothing of it is inside the frame."""
    low = np.floor(outline[0].min(axis=0)).astype(int) - MARGIN
    high = np.ceil(outline[0].max(axis=0)).astype(int) + MARGIN
    left, top = (int(value) for value in np.maximum(low, 0))
    right, bottom = (int(value) for value in np.minimum(high, frame[::-1]))
    if right <= left or bottom <= top:
        return None
    size = (right - left, bottom - top)
    image = material[rng.integers(len(material))]
    zoom = max(rng.uniform(0.6, 1.4), size[0] / image.width, size[1] / image.height)
    texture = tone(_random_crop(image, size, zoom, rng), rng, tint=0.2)
    return Layer(category, left, top, rasterize(outline, left, top, *size), texture)


def _fits(scene: Scene, layer: Layer, wanted_area: float) -> bool:
    """Whether a layer may be pasted: large enough, hiding nobody too much, and visible against what is below."""
    mask = layer.mask
    if mask.sum() < max(MIN_AREA, MIN_INSIDE * wanted_area):
        return False
    covered = scene.owner[layer.window][mask]
    for index in np.unique(covered[covered >= 0]):
        left_over = (scene.owner == index).sum() - (covered == index).sum()
        if left_over < max(MIN_AREA, MIN_VISIBLE * scene.layers[index].mask.sum()):
            return False
    return contrast_share(scene.image[layer.window], layer) >= MIN_CONTRAST_SHARE


def contrast_share(below: np.ndarray, layer: Layer) -> float:
    """Share of a cut-out's border along which it differs from what it is pasted on.

    The mean colour of the layer inside the mask and that of ``below`` outside of it are compared in a small window
    around every border pixel; the distance is the root mean square over the three channels.

    Args:
        below: (h, w, 3) uint8, the picture in the layer's window before pasting.
        layer: the cut-out.

    Returns:
        0 to 1; 0 where the layer has no border inside the picture.
    """
    inside = layer.mask
    border = inside & ~ndimage.binary_erosion(inside, border_value=1)
    if not border.any():
        return 0.0
    difference = _local_mean(layer.texture, inside)[border] - _local_mean(below, ~inside)[border]
    return float((np.sqrt((difference**2).mean(axis=1)) >= MIN_CONTRAST).mean())


def _local_mean(colours: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Mean colour of the selected pixels in a window around each pixel, (h, w, 3); unspecified where there is none."""
    weight = ndimage.uniform_filter(where.astype(float), WINDOW, mode='constant')
    total = ndimage.uniform_filter(colours * where[..., None].astype(float), (WINDOW, WINDOW, 1), mode='constant')
    return total / np.maximum(weight, 1 / WINDOW**2)[..., None]
