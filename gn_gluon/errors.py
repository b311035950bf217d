"""What can go wrong by bad input, and the exit code each leaves with: 2 bad input, 3 NaN loss, 128 + signal."""
import os
import sys
import traceback

#: Whether this process must end without the good-bye of its libraries, which would wait for ever for other processes.
end_at_once = False


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
        self.signum = signum
        self.exit_code = 128 + signum


def command(main):
    """Run `main()` as a command: a UserError becomes one line on stderr and its exit code, never a traceback."""
    try:
        main()
    except UserError as error:
        # gin appends lines of its own to what a constructor that it calls raises
        print(f'error: {str(error).splitlines()[0]}', file=sys.stderr)
        _end(error.exit_code)
    except Interrupted as stop:
        _end(stop.exit_code)
    except KeyboardInterrupt:
        _end(130)
    except SystemExit as end:
        _end(end.code or 0)
    except Exception:
        if not end_at_once:
            raise
        traceback.print_exc()
        _end(1)


def _end(code):
    # While the exception is handled: what it refers to is not deleted, which for MXNet's kvstore means a good-bye.
    if end_at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
