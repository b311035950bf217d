"""What can go wrong by bad input, and the exit code each leaves with: 2 bad input, 3 NaN loss, 128 + signal."""
import sys


class UserError(Exception):
    """Bad input. The message is one sentence: what was found, where, what to do. Commands exit with 2."""

    exit_code = 2


class NaNLossError(UserError):
    """The training loss is not finite. Commands exit with 3."""

    exit_code = 3


class Interrupted(Exception):  # noqa: N818 - not an error: the user asked for it
    """A signal asked the run to stop. Commands exit with 128 + `signum` (130 after Ctrl-C, 143 after SIGTERM)."""

    def __init__(self, signum):
        super().__init__(f'interrupted by signal {signum}')
        self.exit_code = 128 + signum


def command(main):
    """Run `main()` as a command: a UserError becomes one line on stderr and its exit code, never a traceback."""
    try:
        main()
    except UserError as error:
        # gin appends lines of its own to what a constructor that it calls raises
        print(f'error: {str(error).splitlines()[0]}', file=sys.stderr)
        sys.exit(error.exit_code)
    except Interrupted as stop:
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
