"""Watch modules in a forward pass: what they are called with, what they return."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ptqsam.errors import ConfigError


class _Reached(Exception):
    """A forward pass has come to the module that was wanted."""


@contextmanager
def captured(module: nn.Module, stop: bool = False) -> Iterator[list[tuple[tuple, dict[str, Any]]]]:
    """Note the arguments with which a module is called.

    Args:
        module: watched.
        stop: leave the context at the first call, before the module runs; what it notes are no copies then. Default
            False.

    Yields:
        List of (args, kwargs), filled as calls happen.

    Raises:
        ConfigError: the module was not called.
    """
    calls: list[tuple[tuple, dict[str, Any]]] = []

    def note(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # what comes after may change a tensor in place
        calls.append((args, kwargs) if stop else tree_map(_copy, (args, kwargs)))
        if stop:
            raise _Reached

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with suppress(_Reached) if stop else nullcontext():
            yield calls
    finally:
        handle.remove()
    if not calls:
        raise ConfigError(
            f'a module ({type(module).__name__}) was not executed; does the model take another path for some images?'
        )


@contextmanager
def returned(module: nn.Module) -> Iterator[list[Any]]:
    """Note what a module returns.

    Yields:
        List of outputs, filled as calls happen.
    """
    outputs: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _args, output: outputs.append(tree_map(_copy, output)))
    try:
        yield outputs
    finally:
        handle.remove()


def result_of(module: nn.Module, forward: Callable[[], Any]) -> Any:
    """Run a forward as far as a module, and return what that returns, with its graph.

    Args:
        module: where it ends.
        forward: calls the module.
    """
    results: list[Any] = []

    def stop(_module: nn.Module, _args: Any, output: Any) -> None:
        results.append(output)
        raise _Reached

    handle = module.register_forward_hook(stop)
    try:
        with suppress(_Reached):
            forward()
    finally:
        handle.remove()
    return results[0]


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
