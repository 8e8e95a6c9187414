import random
import socket
from contextlib import ExitStack


def free_port() -> int:
    """The first of two ports that nothing listens on.

    Linux gives out others, from 32768, to whom asks for any: what does so before the port is taken
    does not get it.
    """
    draw = random.SystemRandom()  # tests of two processes have one seed
    while True:
        port = draw.randrange(10000, 32000)
        try:
            with ExitStack() as sockets:
                for number in (port, port + 1):
                    sockets.enter_context(socket.socket()).bind(('127.0.0.1', number))
        except OSError:
            continue
        return port
