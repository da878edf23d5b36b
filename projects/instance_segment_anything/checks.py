"""Refuse misspelt settings, naming the closest valid one."""

import difflib
from collections.abc import Iterable

from ptqsam.errors import ConfigError


def reject_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise when a key is not one of the known ones.

    Args:
        where: path of the settings in the config, for example 'model.test_cfg'.
        given: keys that the user wrote.
        known: keys that exist.

    Raises:
        ConfigError: names the first unknown key and the closest known one.
    """
    known = list(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            advice = f"did you mean '{near[0]}'?" if near else f'known: {", ".join(known)}'
            raise ConfigError(f"{where}: unknown key '{key}' ({advice})")
