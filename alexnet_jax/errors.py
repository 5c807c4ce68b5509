"""The one kind of error that is the user's to mend, and how commands report it."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """One line: what is wrong, where, and what to do."""


def run(main: Callable[[], None]) -> None:
    """Runs a command; a `UserError` becomes one line on stderr and exit code 2, without a traceback."""
    try:
        main()
    except UserError as error:
        print(f'error: {error}', file=sys.stderr, flush=True)
        sys.exit(2)
