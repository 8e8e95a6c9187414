"""torchrun, which ends with its processes' words instead of a traceback of its own."""

import signal
import sys

from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def stop(number, _):
    """As torchrun does at SIGTERM; it passes the signal on."""
    raise SignalException(f'got signal {number}', signal.Signals(number))


if __name__ == '__main__':
    # Others that a scheduler can be asked to send, as Slurm by --signal=USR1@120.
    for name in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU):
        signal.signal(name, stop)
    try:
        main()
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except DistNetworkError as error:
        if 'EADDRINUSE' not in str(error):
            raise
        port = int(next(x for x in sys.argv if x.startswith('--master_port=')).partition('=')[2])
        sys.exit(
            f'error: port {port} is in use, perhaps by another run; choose another by '
            f'PORT={port + 1} before the command.'
        )
    except ChildFailedError as error:
        # Others may end of its end within the second that torchrun tells times by.
        killed = [x for x in error.failures.items() if x[1].exitcode < 0]
        rank, failure = killed[0] if killed else error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f'error: rank {rank} was ended by {name}.', file=sys.stderr)
            sys.exit(128 - failure.exitcode)
        sys.exit(failure.exitcode)
