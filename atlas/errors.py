"""The one exception that is the user's to mend.

`AtlasError` carries one line that names the value, the reason and the remedy; the command line prints
it and exits with 2. Any other exception is a bug in Atlas and shows its traceback.
"""


class AtlasError(Exception):
    """A mistake the user can mend. The message is one line: value, reason, remedy."""


class EndedElsewhere(Exception):
    """A run of several processes ends by what another of them has said."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end.

    A class of its own because CPython, where a plain KeyboardInterrupt has passed through code that it executes
    from a text, may end by SIGINT whatever exit code was asked for: seen in 4 of 16 runs that were interrupted
    while modules were loaded.
    """
