"""The one exception that becomes a one-line message and exit code 2."""

from collections.abc import Iterator
from contextlib import contextmanager


class CliError(Exception):
    """A mistake in what was asked for: a missing file, a wrong option."""


@contextmanager
def from_options() -> Iterator[None]:
    """Blame the options for a ValueError inside the block, where they are all that can be wrong."""
    try:
        yield
    except ValueError as error:
        raise CliError(str(error)) from None
