"""The embedded default data set: composed photographs with exact masks, in COCO format."""

from projects.scenes.generate import CATEGORIES, generate_scenes, read_manifest

__all__ = ['CATEGORIES', 'generate_scenes', 'read_manifest']
