"""The packed checkpoint: weights as real b-bit codes in safetensors, and a manifest that is written last.

A folder with `model.safetensors` and `manifest.json`. The manifest is the commit point and holds the SHA-256 of the
tensors, the recipe, and what the model must look like. Reloading gives the frozen model bit for bit.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ptqsam import __version__
from ptqsam.config import parse_quant_config
from ptqsam.errors import AssetError
from ptqsam.fileio import atomic_path, fingerprint, sha256_file, write_json
from ptqsam.modules.walk import quant_ops, quantizers
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.rules import RuleBook

TENSORS = 'model.safetensors'
MANIFEST = 'manifest.json'
FORMAT = 'ptqsam-packed-1'


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Store integers of b bits densely.

    Args:
        codes: any shape, integers in 0 .. 2^bits - 1.
        bits: 2..8.

    Returns:
        uint8, 1-D, ceil(codes.size * bits / 8) bytes; the lowest bit comes first.
    """
    planes = np.unpackbits(codes.astype(np.uint8).reshape(-1, 1), axis=1, count=bits, bitorder='little')
    return np.packbits(planes.reshape(-1), bitorder='little')


def unpack_codes(packed: np.ndarray, bits: int, size: int) -> np.ndarray:
    """Inverse of `pack_codes`.

    Args:
        packed: uint8, 1-D.
        bits: 2..8.
        size: number of codes.

    Returns:
        uint8, 1-D, ``size`` values.
    """
    planes = np.unpackbits(packed, count=size * bits, bitorder='little').reshape(size, bits)
    return np.packbits(planes, axis=1, bitorder='little').reshape(-1)


def structure(model: nn.Module) -> dict[str, list[int]]:
    """Tensor names and shapes of a float model: what a packed checkpoint must fit."""
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def float_bytes(model: nn.Module) -> int:
    """Bytes of a model's tensors as they are."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def save_packed(
    folder: Path,
    model: nn.Module,
    float_structure: dict[str, list[int]],
    recipe: dict[str, Any],
    origin: dict[str, Any],
    errors: dict[str, dict[str, float | None]],
) -> int:
    """Write a frozen model.

    Args:
        folder: made if missing; an older packed checkpoint in it is replaced.
        model: frozen SAM with quant modules.
        float_structure: `structure` of the model before it was quantized.
        recipe: `QuantConfig.plain()`.
        origin: what the result depends on (checkpoint hash, calibration images, ...), compared on resume.
        errors: quantizer path -> quantization error, for the summary of later runs.

    Returns:
        Size of the two files in bytes.
    """
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    weights = {}
    for name, op, quantizer in quant_ops(model):
        codes = quantizer.encode(op.weight) - quantizer.qmin
        weights[f'{name}.weight'] = dict(bits=quantizer.bits, shape=list(codes.shape))
        packed = pack_codes(codes.cpu().numpy(), quantizer.bits)
        tensors[f'{name}.weight'] = torch.from_numpy(packed)
    narrow = {name: _narrowest(tensor) for name, tensor in tensors.items()}
    dtypes = {name: str(t.dtype).removeprefix('torch.') for name, t in tensors.items() if t.dtype != narrow[name].dtype}

    (folder / MANIFEST).unlink(missing_ok=True)
    with atomic_path(folder / TENSORS) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in narrow.items()}, temporary)
    manifest = dict(
        format=FORMAT,
        ptqsam=__version__,
        sha256=sha256_file(folder / TENSORS),
        structure=fingerprint(float_structure),
        num_tensors=len(float_structure),
        recipe=recipe,
        origin=origin,
        quantizers={q.path: dict(type=type(q).__name__, bits=q.bits) for q in quantizers(model)},
        weights=weights,
        dtypes=dtypes,
        errors=errors,
    )
    write_json(folder / MANIFEST, manifest | dict(checksum=fingerprint(manifest)))
    return packed_size(folder)


def packed_size(folder: Path) -> int:
    """Bytes of a packed checkpoint."""
    return (folder / TENSORS).stat().st_size + (folder / MANIFEST).stat().st_size


def read_manifest(folder: Path) -> dict[str, Any]:
    """Manifest of a packed checkpoint, checked against its tensors.

    Raises:
        AssetError: missing, not a manifest, other format, or the tensors are not those that were written.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise AssetError(f'{folder}: no packed checkpoint here ({MANIFEST} is missing); a finished run writes one')
    try:
        manifest = json.loads(path.read_text(encoding='utf-8'))
        known, checksum = manifest['format'], manifest.pop('checksum')
    except (ValueError, KeyError, TypeError, AttributeError):
        raise AssetError(
            f'{path}: not a manifest of a packed checkpoint; make it again by running the recipe'
        ) from None
    if known != FORMAT:
        raise AssetError(
            f"{path}: format '{known}', this version reads '{FORMAT}'; make it again by running the recipe"
        )
    if fingerprint(manifest) != checksum:
        raise AssetError(f'{path}: was damaged or changed since it was written; make it again by running the recipe')
    tensors = folder / TENSORS
    if not tensors.is_file():
        raise AssetError(f'{tensors}: missing; make the packed checkpoint again by running the recipe')
    if sha256_file(tensors) != manifest['sha256']:
        raise AssetError(f'{tensors}: differs from what {MANIFEST} says (SHA-256); the file was damaged or changed')
    return manifest


def load_packed(folder: Path, model: nn.Module) -> tuple[dict[str, Any], RuleBook]:
    """Turn a float SAM into the packed one.

    Args:
        folder: packed checkpoint.
        model: float SAM of the same architecture; its weights do not matter. Changed in place.

    Returns:
        The manifest, and the rules with their decisions.

    Raises:
        AssetError: damaged, or made for another model.
    """
    manifest = read_manifest(folder)
    own = structure(model)
    if fingerprint(own) != manifest['structure']:
        raise AssetError(
            f'{folder}: made for another model ({manifest["num_tensors"]} tensors; this one has {len(own)} or other '
            'shapes); use the model config that it was made with'
        )
    rules = RuleBook(parse_quant_config(manifest['recipe'], str(folder / MANIFEST)))
    device = next(model.parameters()).device
    quantize_model(model.cpu(), rules)
    planned = {q.path: dict(type=type(q).__name__, bits=q.bits) for q in quantizers(model)}
    if planned != manifest['quantizers']:
        raise AssetError(f'{folder}: its quantizers are not those of its recipe; make it again by running the recipe')
    try:
        tensors = load_file(folder / TENSORS)
    except SafetensorError as error:
        raise AssetError(f'{folder / TENSORS}: not a safetensors file ({error})') from None
    for name, dtype in manifest['dtypes'].items():
        tensors[name] = tensors[name].to(getattr(torch, dtype))
    packed = {name: tensors.pop(name) for name in manifest['weights']}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    wrong = sorted(set(missing) - set(packed)) + sorted(unexpected)
    if wrong:
        raise AssetError(f'{folder}: tensors do not fit the model, for example {wrong[0]}')
    _restore_weights(model, packed, manifest['weights'])
    for quantizer in quantizers(model):
        quantizer.mode = 'quantize'
    model.to(device)
    return manifest, rules


@torch.no_grad()
def _restore_weights(model: nn.Module, packed: dict[str, Tensor], layout: dict[str, dict[str, Any]]) -> None:
    """Decode the codes into the weights of the quantized operators."""
    for name, op, quantizer in quant_ops(model):
        bits, shape = layout[f'{name}.weight']['bits'], layout[f'{name}.weight']['shape']
        codes = unpack_codes(packed[f'{name}.weight'].numpy(), bits, int(np.prod(shape))).reshape(shape)
        values = quantizer.decode(torch.from_numpy(codes).to(torch.int32) + quantizer.qmin)
        op.weight = nn.Parameter(values, requires_grad=False)
        op.frozen = True


def _narrowest(tensor: Tensor) -> Tensor:
    """An integer tensor in the smallest integer type that holds its values; anything else as it is."""
    if tensor.dtype not in (torch.int16, torch.int32, torch.int64) or tensor.numel() == 0:
        return tensor
    low, high = int(tensor.min()), int(tensor.max())
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        info = torch.iinfo(dtype)
        if info.min <= low and high <= info.max:
            return tensor.to(dtype)
    return tensor
