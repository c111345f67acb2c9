"""A program under a flow: it tells that it has begun, and whether it is the only one of its child.

`python program.py FOLDER SECONDS [stubborn] [family] [later]`. Stubborn, it does not hear SIGTERM; with a family,
it leaves a process behind in its session; with later, it ends at once if it is not the first attempt. It writes a
line to `FOLDER/marks`: child, attempt, its own number, that of the process that started it, and "alone" or
"beside". It is alone if it can lock `FOLDER/<child>.lock`: the kernel lets go of the lock when the program is
dead, its family included, and not before.

Only what a bare interpreter has: it is started often.
"""

import fcntl
import os
import signal
import sys
import time


def main() -> None:
    folder, seconds, *words = sys.argv[1:]
    if "stubborn" in words:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent, child = os.getppid(), os.environ["FLOWSTEAD_TASK_ID"]
    lock = os.open(f"{folder}/{child}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = "alone"
    except OSError:
        alone = "beside"
    if "family" in words and os.fork() == 0:
        for pipe in (0, 1, 2):
            os.close(pipe)
        time.sleep(60)
        os._exit(0)
    marks = os.open(f"{folder}/marks", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    attempt = os.environ["FLOWSTEAD_ATTEMPT"]
    os.write(marks, f"{child} {attempt} {os.getpid()} {parent} {alone}\n".encode())
    time.sleep(0.0 if "later" in words and attempt != "1" else float(seconds))
    sys.stdout.write(child)


if __name__ == "__main__":
    main()
