"""Errors that end a run with one clear line and an exit code.

Every message says what is wrong, where, why, and what to do, in one line.
"""


class PTQSAMError(Exception):
    """Base of all errors that a user can cause or cure.

    Attributes:
        exit_code: what the command line returns for this kind of error.
    """

    exit_code = 1


class ConfigError(PTQSAMError):
    """Bad usage: command line, model config, recipe, work dir (exit code 2)."""

    exit_code = 2


class AssetError(PTQSAMError):
    """A missing, damaged, foreign or unsafe file: data or checkpoint (exit code 3)."""

    exit_code = 3


class GateError(PTQSAMError):
    """The model is not honestly quantized, or its numbers are not finite (exit code 4)."""

    exit_code = 4
