"""accelerate's launcher as main.py starts it: silent where the training process tells the reason itself.

A SIGINT, or a training process that failed or was stopped, would end it with a traceback or two of its own.
"""

import logging
import os
import runpy
import signal
import sys

from supervise import LAUNCHER_PID

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ[LAUNCHER_PID] = str(os.getpid())
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        runpy.run_module("accelerate.commands.launch", run_name="__main__", alter_sys=True)
    except Exception as error:
        # By name, since torch is slow to import and not needed for one process.
        if type(error).__name__ == "SignalException":
            number = error.sigval  # type: ignore[attr-defined]
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if type(error).__name__ != "ChildFailedError":
            raise
        sys.exit(1)
