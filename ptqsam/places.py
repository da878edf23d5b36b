"""Where data and checkpoints lie: it differs between machines, and no result depends on it."""

import json
import os
from typing import Any


def without_places(value: Any) -> str:
    """A config as text, in which the folders of `PTQSAM_DATA` and `PTQSAM_CKPT` stand by those names.

    Args:
        value: nested dicts, lists and scalars; anything else counts by its ``str``.
    """
    text = json.dumps(value, sort_keys=True, default=str)
    for name, usual in (('PTQSAM_DATA', 'data'), ('PTQSAM_CKPT', 'ckpt')):
        place = json.dumps(os.path.expanduser(os.environ.get(name) or usual))[1:-1]
        text = text.replace(f'"{place}/', f'"${name}/')
    return text
