"""Runs a server: python keeper.py COMMAND ...

Ends it, and all that it started, when standard input closes: so also when whoever holds the other end is killed. Without
this, a server with an old pattern would live on and answer for the next one. Linux.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading

GRACE = 30  # Seconds that a server has to end by itself.
PR_SET_CHILD_SUBREAPER = 36


def end():
    """Asks the process group to end, and kills it, this process included, if it has not after a while."""
    os.killpg(0, signal.SIGTERM)
    last = threading.Timer(GRACE, os.killpg, (0, signal.SIGKILL))
    last.daemon = True
    last.start()


def keep(command):
    """Returns when all that the server started has ended, with the server's status."""
    # Orphans of the server become children of this process, which can wait for them then.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: None)
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=lambda: (os.read(0, 1), end()), daemon=True).start()
    status = server.wait()
    end()
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1:]))
