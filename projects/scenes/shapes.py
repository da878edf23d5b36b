"""Outlines of the categories and their exact rasterization."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

# An outline is a list of closed polygons (N, 2), x before y: the outer contour first, then holes.
Outline = list[np.ndarray]

CURVE_POINTS = 128
SUBPIXELS = 8
BLOB_HOLE_PROBABILITY = 0.25


def _closed_curve(radius: np.ndarray, angle: np.ndarray, aspect: float = 1.0) -> np.ndarray:
    return np.stack([radius * np.cos(angle), aspect * radius * np.sin(angle)], axis=1)


def _ellipse_contour(aspect: float) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, CURVE_POINTS, endpoint=False)
    return _closed_curve(np.ones_like(angle), angle, aspect)


def _ellipse(rng: np.random.Generator) -> Outline:
    return [_ellipse_contour(rng.uniform(0.4, 1.0))]


def _polygon(rng: np.random.Generator) -> Outline:
    corners = int(rng.integers(3, 8))
    angle = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * np.pi / corners
    return [_closed_curve(rng.uniform(0.6, 1.0, corners), angle)]


def _star(rng: np.random.Generator) -> Outline:
    tips = int(rng.integers(4, 8))
    angle = np.arange(2 * tips) * np.pi / tips
    radius = np.where(np.arange(2 * tips) % 2, rng.uniform(0.4, 0.65), 1.0)
    return [_closed_curve(radius, angle, rng.uniform(0.7, 1.0))]


def _blob(rng: np.random.Generator) -> Outline:
    angle = np.linspace(0, 2 * np.pi, CURVE_POINTS, endpoint=False)
    radius = np.ones_like(angle)
    for order in range(2, 6):
        radius += rng.uniform(0.0, 0.5 / order) * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
    outline = [_closed_curve(radius, angle, rng.uniform(0.6, 1.0))]
    if rng.random() < BLOB_HOLE_PROBABILITY:
        outline.append(_ellipse_contour(rng.uniform(0.6, 1.0)) * outline[0].std() * rng.uniform(0.35, 0.6))
    return outline


def _ring(rng: np.random.Generator) -> Outline:
    outer = _ellipse_contour(rng.uniform(0.6, 1.0))
    return [outer, outer * rng.uniform(0.45, 0.7)]


SHAPES: dict[str, Callable[[np.random.Generator], Outline]] = {
    'ellipse': _ellipse,
    'polygon': _polygon,
    'star': _star,
    'blob': _blob,
    'ring': _ring,
}


def _polygon_area(points: np.ndarray) -> float:
    x, y = points.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def random_outline(category: str, area: float, center: tuple[float, float], rng: np.random.Generator) -> Outline:
    """Draw a shape of a category with a wanted area, turned by a random angle.

    Args:
        category: key of ``SHAPES``.
        area: enclosed area in pixels, holes taken off.
        center: (x, y) in pixels.
        rng: source of chance.

    Returns:
        Closed polygons in pixels, outer contour first.
    """
    outline = SHAPES[category](rng)
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    scale = np.sqrt(area / (_polygon_area(outline[0]) - sum(_polygon_area(hole) for hole in outline[1:])))
    return [points @ rotation * scale + np.asarray(center) for points in outline]


def rasterize(outline: Outline, left: int, top: int, width: int, height: int) -> np.ndarray:
    """Coverage of each pixel of a window by an outline.

    Vertices are rounded to 1/8 pixel and the fill is integer arithmetic, so that the last bit of a cosine, which
    differs between processors, does not reach the picture.

    Args:
        outline: closed polygons in image pixels.
        left, top, width, height: window in image pixels; what lies outside is cut off.

    Returns:
        (height, width) uint8 alpha, 255 where the pixel is fully covered.
    """
    fine = Image.new('L', (width * SUBPIXELS, height * SUBPIXELS), 0)
    draw = ImageDraw.Draw(fine)
    for index, points in enumerate(outline):
        vertices = np.rint((points - (left, top)) * SUBPIXELS).astype(int)
        draw.polygon([tuple(vertex) for vertex in vertices.tolist()], fill=0 if index else 255)
    return np.asarray(fine.reduce(SUBPIXELS))
