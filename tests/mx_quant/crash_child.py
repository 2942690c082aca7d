"""Runs ``quantize_checkpoint`` in forked children that are killed at a chosen system call, or after a chosen time.

One JSON object a line on stdin: {"src", "out", "options", "kill": n, "mode": "before" | "half" | "after", "timer": seconds};
one a line on stdout: {"signal", "events", "error"}. ``events`` counts the system calls that change files.
Importing torch takes a second and forking takes milliseconds, so that a test can afford hundreds of kills.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time

import torch

import mx_kernels as mk
from mx_quant.offline import quantize_checkpoint

CALLS = ("pwrite", "write", "fsync", "fdatasync", "ftruncate", "rename", "replace", "unlink", "mkdir", "rmdir", "open")


def install(kill, mode, count):
    lock = threading.Lock()

    def wrap(name, real):
        def call(*args, **kwargs):
            if name == "open" and not (len(args) > 1 and args[1] & os.O_CREAT):
                return real(*args, **kwargs)
            with lock:
                count[0] += 1
                mine = count[0] == kill
            if mine and mode == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if mine and mode == "half" and name in ("pwrite", "write"):
                data = memoryview(args[1]).cast("B")
                real(args[0], data[: len(data) // 2], *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*args, **kwargs)
            finally:
                if mine:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))


def child(task, pipe):
    count = [0]
    install(task.get("kill", 0), task.get("mode", "after"), count)
    error = None
    try:
        quantize_checkpoint(task["src"], task["out"], **task["options"])
    except Exception as e:  # told to the test, which knows which errors it expects
        error = f"{type(e).__name__}: {e}"
    pipe.write(json.dumps({"events": count[0], "error": error}))
    pipe.flush()
    os._exit(0)


def main():
    # What PyTorch imports at the first call of a custom op takes a second: before the forks, once.
    mk.quantize(torch.zeros(1, 32), mk.MXFP8)
    for line in sys.stdin:
        task = json.loads(line)
        r, w = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(r)
            child(task, os.fdopen(w, "w"))
        os.close(w)
        if "timer" in task:
            time.sleep(task["timer"])
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        text = os.fdopen(r).read()
        _, status = os.waitpid(pid, 0)
        found = {"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0}
        print(json.dumps(found | (json.loads(text) if text else {})), flush=True)


if __name__ == "__main__":
    main()
