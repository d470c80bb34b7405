"""The errors that the user can fix.

An `AtlasError` carries one line that names the value, the reason and the remedy; the command line prints it and exits
with 2. Its subclasses say which part of Atlas refused, for code that calls Atlas from Python. Any other exception is a
bug in Atlas and shows its traceback.
"""


class AtlasError(Exception):
    """A mistake the user can fix. The message is one line: value, reason, remedy."""


class ConfigError(AtlasError):
    """A setting that is unknown, misplaced or out of range, or a config file that cannot be read."""


class TokenizerError(AtlasError):
    """A tokenizer that cannot be loaded, trained or used."""


class DataError(AtlasError):
    """Text or a prepared dataset that cannot be read, prepared or trained on."""


class CheckpointError(AtlasError):
    """A checkpoint that is missing, damaged, or does not fit the run."""


class ExportError(AtlasError):
    """A model that cannot be exported or imported, or an export whose proof failed."""


class EndedElsewhere(Exception):
    """A run of several processes ends by what another of them has said."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end.

    A class of its own because CPython, where a plain KeyboardInterrupt has passed through code that it executes
    from a text, may end by SIGINT whatever exit code was asked for: seen in 4 of 16 runs that were interrupted
    while modules were loaded.
    """
