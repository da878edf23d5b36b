"""Going on from a packed checkpoint: of an earlier run of the same kind, or named by the user."""

from pathlib import Path
from typing import Any

from ptqsam.checkpoint import MANIFEST, read_manifest
from ptqsam.config import QuantConfig, parse_quant_config
from ptqsam.errors import AssetError, ConfigError


def find_packed(folder: Path, origin: dict[str, Any]) -> Path | None:
    """The packed checkpoint that an earlier run left, if there is one.

    Args:
        folder: where it would be.
        origin: what the quantized model of this run depends on.

    Raises:
        ConfigError: it was made under other conditions.
    """
    if not (folder / MANIFEST).is_file():
        return None
    earlier = read_manifest(folder)['origin']
    if differing := [key for key in origin if earlier.get(key) != origin[key]]:
        raise ConfigError(
            f'--resume: {folder} differs from this run in {", ".join(differing)}; '
            'run without --resume or with another --work-dir'
        )
    return folder


def check_same(folder: Path, manifest: dict[str, Any], recipe: QuantConfig, weights: str | None) -> None:
    """Refuse a packed checkpoint of another recipe, or of other weights than the float row of the table.

    Args:
        folder: of the checkpoint.
        manifest: of the checkpoint.
        recipe: of this run.
        weights: hash of the weights of the float model where that is evaluated, else None.

    Raises:
        AssetError: says what differs.
    """
    own = recipe.plain()
    # parsed, so that what later versions have added counts as its default
    packed = parse_quant_config(manifest['recipe'], str(folder / MANIFEST)).plain()
    if differing := [key for key in own if packed[key] != own[key]]:
        raise AssetError(
            f'{folder}: made with another recipe than this run, they differ in {", ".join(differing)}; name the recipe '
            'and options that it was made with'
        )
    if weights is not None and manifest['origin']['checkpoint'] != weights:
        raise AssetError(
            f'{folder}: made from other weights than those of the float model; leave out --eval-fp, or name those'
        )
