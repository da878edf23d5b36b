"""Weights out of files that somebody else made: tensors only, no code, one clear line when something is wrong."""

import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from mmengine.dist import is_main_process
from mmengine.logging import MMLogger
from safetensors import SafetensorError
from torch import Tensor, nn

from ptqsam.download import how_to_get, official
from ptqsam.errors import AssetError
from ptqsam.unhashed import LEGACY_START, ZIP_START

_LFS_START = b'version https://git-lfs.github.com/spec/'
_MARKUP = re.compile(rb'\s*<(!doctype|html|\?xml|head|body)', re.IGNORECASE)
_WRAPPER = 'module.'  # DataParallel and weight averages put the model into a child of this name
_AVERAGE_COUNTERS = ('n_averaged', 'steps')  # beside that child, of torch and of mmengine
# beginnings of what torch itself allows; only to tell it from the rest in a message
_TORCH_ALLOWS = ('torch.', 'collections.', '_codecs.', 'builtins.set', 'builtins.bytearray', 'builtins.complex')


class _Discarded:
    """Stands in for the objects of a checkpoint's log and metadata, of which nothing is kept.

    OpenMMLab checkpoints hold training logs (numpy scalars, HistoryBuffer over numpy arrays), DETR's family the options
    of the training script (Namespace). Letting these inert objects take their place runs neither mmengine's nor numpy's
    unpickling code, and one list serves numpy 1 and 2.
    """

    def __new__(cls, *args: object, **kwargs: object) -> '_Discarded':
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def _discarded_attribute(owner: object, name: str) -> _Discarded:
    """``getattr`` as far as a pickled HistoryBuffer needs it, which refers to its own four methods."""
    if owner is not _Discarded:
        raise pickle.UnpicklingError(f'GLOBAL builtins.getattr of {owner!r}')
    return _Discarded()


_ALLOWED: dict[str, Callable] = {
    'argparse.Namespace': _Discarded,
    'builtins.getattr': _discarded_attribute,
    'mmengine.logging.history_buffer.HistoryBuffer': _Discarded,
    'numpy.dtype': _Discarded,
    'numpy.ndarray': _Discarded,
    # numpy 2, numpy 1
    'numpy._core.multiarray._reconstruct': _Discarded,
    'numpy._core.multiarray.scalar': _Discarded,
    'numpy.core.multiarray._reconstruct': _Discarded,
    'numpy.core.multiarray.scalar': _Discarded,
}


def load_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read the state dict of a checkpoint without running anything that the file contains.

    Args:
        path: see ``read_checkpoint``. A state dict inside an entry ``state_dict`` or ``model`` is unwrapped; everything
            around it is dropped. A prefix ``module.`` of all names is taken off, which the user is told.

    Returns:
        Tensors on the CPU by name, with the module versions (``_metadata``) that the file holds. They may be backed by
        the file itself, which must not be overwritten in place while they are in use.

    Raises:
        AssetError: see ``read_checkpoint``; or the file holds no state dict.
    """
    return find_state_dict(read_checkpoint(path), path)


def read_checkpoint(path: str | os.PathLike) -> Any:
    """Read all of a checkpoint without running anything that the file contains.

    Args:
        path: a file written by ``torch.save`` (today's or the format before torch 1.6) or a ``.safetensors`` file.

    Returns:
        Tensors on the CPU and plain containers; inert objects where the file holds logs and options.

    Raises:
        AssetError: missing, empty, truncated, not a checkpoint, or asks for code to be run.
    """
    path = Path(path)
    try:
        with open(path, 'rb') as file:
            start = file.read(512)
    except FileNotFoundError:
        raise AssetError(f'{path}: no such file; {how_to_get(path)}') from None
    except OSError as error:
        raise AssetError(f'{path}: cannot be read ({error.strerror})') from None
    if not start:
        raise AssetError(f'{path}: empty file; {how_to_get(path)}')
    if start.startswith(_LFS_START):
        raise AssetError(f'{path}: a Git LFS pointer in place of the file; run `git lfs pull`, or {how_to_get(path)}')
    if _MARKUP.match(start):
        raise AssetError(f'{path}: a web page saved under the name of a checkpoint; {how_to_get(path)}')
    # a header length and JSON: the content counts, not the suffix
    return _load_safetensors(path) if start[8:9] == b'{' else _load_torch(path, start)


def find_state_dict(
    content: Any, path: str | os.PathLike, entries: Sequence[str] = ('state_dict', 'model')
) -> dict[str, Tensor]:
    """The state dict in what ``read_checkpoint`` returned: tensors by name and nothing else.

    Args:
        content: a state dict, or a dict that holds one.
        path: where it comes from, for messages.
        entries: where it may lie, outermost first; each is gone into where it is there.

    Returns:
        Tensors by name, without a prefix ``module.`` that all of them have.

    Raises:
        AssetError: there is none, or something in it is no tensor.
    """
    for key in entries:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        kind = type(content).__name__
        keys = ', '.join(map(str, list(content)[:5])) if isinstance(content, dict) else ''
        found = f'a dict of {keys or "nothing"}' if isinstance(content, dict) else f'a {kind}'
        places = ' or '.join(f"'{key}'" for key in entries)
        raise AssetError(f'{path}: holds no state dict, neither bare nor under {places}, but {found}')
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise AssetError(f"{path}: entry '{name}' of the state dict is no tensor but a {type(value).__name__}")
    return _unwrapped(content, path)


def tell(message: str) -> None:
    """Tell the user one line about a file, once for all processes: on the console and in the log of a run."""
    if is_main_process():
        MMLogger.get_current_instance().warning(message)


class Misfits(NamedTuple):
    """What of a state dict and of a module did not meet, as names; ``shapes`` with both shapes."""

    missing: list[str]
    unexpected: list[str]
    shapes: list[str]

    def __str__(self) -> str:
        """In one line, at most three of each."""
        parts = (
            _listed(self.missing, 'missing'),
            _listed(self.unexpected, 'unexpected'),
            _listed(self.shapes, 'of another shape'),
        )
        return '; '.join(part for part in parts if part)


def load_state_dict_strict(
    module: nn.Module,
    state: dict[str, Tensor],
    source: str,
    ignore: Iterable[str] = (),
    hint: Callable[[dict[str, Tensor]], str | None] | None = None,
) -> None:
    """Load every parameter and buffer of a module, or say in one line what does not fit.

    Args:
        module: receives the values; after an error it may hold some of them and must not be used.
        state: tensors by name.
        source: where they come from, for the message.
        ignore: regular expressions (``re.search``) of names that may be missing or left over.
        hint: looks at ``state`` and says what it fits instead, or None.

    Raises:
        AssetError: names are missing, left over or have another shape; at most three of each are listed.
    """
    misfits = load_state_dict(module, state, source, ignore)
    if any(misfits):
        advice = hint(state) if hint else None
        raise AssetError(f'{source}: does not fit {type(module).__name__}: {misfits}{f"; {advice}" if advice else ""}')


def load_state_dict(module: nn.Module, state: dict[str, Tensor], source: str, ignore: Iterable[str] = ()) -> Misfits:
    """Load what fits into a module and leave it to the caller to judge the rest.

    Args:
        module, state, source, ignore: as for ``load_state_dict_strict``.

    Returns:
        What did not fit.

    Raises:
        AssetError: the module cannot take the state dict for another reason than names and shapes.
    """
    wanted = module.state_dict()
    try:
        # not strict: modules may rename the keys of older versions, so that only torch knows what is missing
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        missing = [name for name in wanted if name not in state]
        unexpected = [name for name in state if name not in wanted]
        shapes = [
            f'{name} is {tuple(state[name].shape)}, needs {tuple(value.shape)}'
            for name, value in wanted.items()
            if name in state and state[name].shape != value.shape
        ]
        if not shapes:
            raise AssetError(f'{source}: cannot be loaded: {" ".join(str(error).split())}') from None
    else:
        shapes = []
    patterns = [re.compile(pattern) for pattern in ignore]

    def counted(names: Iterable[str]) -> list[str]:
        return [name for name in names if not any(pattern.search(name) for pattern in patterns)]

    return Misfits(counted(missing), counted(unexpected), shapes)


def _listed(names: list[str], what: str) -> str:
    """'5 missing (a, b, c, ...)', or nothing."""
    more = ', ...' if len(names) > 3 else ''
    return f'{len(names)} {what} ({", ".join(names[:3])}{more})' if names else ''


def _load_torch(path: Path, start: bytes) -> Any:
    """Unpickle under the allow-list."""
    allowed: list[Any] = [(stand_in, name) for name, stand_in in _ALLOWED.items()]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about pickle protocols; the error that follows says more
            return torch.load(path, map_location='cpu', weights_only=True, mmap=_can_map(path))
    except MemoryError:
        raise
    except Exception as error:  # foreign bytes can break the reader in any way
        raise _explain(path, start, error) from None


def _can_map(path: Path) -> bool:
    """Whether torch can use the tensors where they lie in the file: half the memory while a model is loaded."""
    try:
        with zipfile.ZipFile(path) as archive:
            return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError):
        return False


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path, device='cpu')
    except (SafetensorError, OSError, ValueError) as error:
        raise AssetError(f'{path}: truncated or damaged safetensors file ({error}); {how_to_get(path)}') from None


def _explain(path: Path, start: bytes, error: Exception) -> AssetError:
    """Turn whatever went wrong inside torch.load into one line."""
    if 'TorchScript' in str(error):
        return AssetError(f'{path}: a TorchScript program, not weights; save the state dict of the model instead')
    named = re.search(r'GLOBAL ([\w.]+)', str(error))
    refused = named[1] if named else _refused_global(path)
    if refused:
        return AssetError(
            f"{path}: refused: the pickle wants to run '{refused}', which no weights file needs; it was not executed; "
            'get the file from its official source, or re-save its state dict alone as safetensors'
        )
    if start.startswith((ZIP_START, LEGACY_START)):
        size = path.stat().st_size
        known = official(path)
        of = f' of {known.size:,}' if known and known.size not in (None, size) else ''
        return AssetError(f'{path}: truncated, damaged or no checkpoint ({size:,}{of} bytes); {how_to_get(path)}')
    return AssetError(f'{path}: not a checkpoint (neither written by torch.save nor safetensors); {how_to_get(path)}')


def _refused_global(path: Path) -> str | None:
    """Name of the first object in the pickle that is not allowed, read without executing anything.

    torch names it itself, except in pickle protocols that it does not read at all (0, 3 and later).
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith('data.pkl'))
                with archive.open(name) as file:
                    return _first_foreign(file)
        with open(path, 'rb') as file:
            return _first_foreign(file)
    except Exception:  # only serves the message
        return None


def _first_foreign(file: Any) -> str | None:
    """First global of a pickle stream outside torch, the standard containers and the allow-list."""
    strings: list[str] = []  # STACK_GLOBAL takes module and name from the last two
    memo: dict[Any, Any] = {}
    top: Any = None
    for operation, argument, _ in pickletools.genops(file):
        found = None
        if operation.name in ('GLOBAL', 'INST'):
            found = str(argument).replace(' ', '.')
        elif operation.name == 'STACK_GLOBAL':
            found = '.'.join(strings[-2:])
        elif operation.name == 'MEMOIZE':
            memo[len(memo)] = top
        elif 'PUT' in operation.name:
            memo[argument] = top
        else:
            top = memo.get(argument) if 'GET' in operation.name else argument
            if isinstance(top, str):
                strings.append(top)
        if found and found not in _ALLOWED and not found.startswith(_TORCH_ALLOWS) and re.fullmatch(r'[\w.]+', found):
            return found
    return None


def _unwrapped(state: dict[str, Tensor], path: str | os.PathLike) -> dict[str, Tensor]:
    """Take the prefix ``module.`` off where all names have it."""
    others = [name for name in state if not name.startswith(_WRAPPER)]
    if len(others) == len(state) or not set(others) <= set(_AVERAGE_COUNTERS):
        return state
    tell(f"{path}: names begin with '{_WRAPPER}', as a parallel model saves them; read without it")
    inner: Any = OrderedDict((name[len(_WRAPPER) :], state[name]) for name in state if name not in others)
    versions = getattr(state, '_metadata', {})
    # the module's own entry is called 'module', without a point
    inner._metadata = {f'{name}.'[len(_WRAPPER) : -1]: value for name, value in versions.items() if name}
    return inner
