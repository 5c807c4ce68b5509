"""The one kind of error that is the user's to mend, and how commands report it."""

import argparse
import sys
from collections.abc import Callable


class UserError(Exception):
    """One line: what is wrong, where, and what to do."""


class ArgumentParser(argparse.ArgumentParser):
    """Like Python's, but what is wrong with the arguments is a `UserError`, not several lines."""

    def error(self, message: str):
        raise UserError(f'{message}; --help lists the options')


def run(main: Callable[[], None]) -> None:
    """Runs a command; a `UserError` becomes one line on stderr and exit code 2, without a traceback."""
    try:
        main()
    except UserError as error:
        print(f'error: {error}', file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr, flush=True)
        sys.exit(130)  # what shells report for it
