"""Runs jobs in children that are forked from one warm process; `conftest.py` starts this script.

Importing torch and transformers takes seconds, a fork milliseconds. Requests and replies are lines
of JSON on stdin and stdout::

    {"job": "command_line", "arguments": {...}, "log": "file", "strike": {...} or null,
     "memory": bytes or null, "timeout": seconds}
    {"status": exit code, or minus the signal, or null when it did not end in time,
     "result": what the job returned, "operations": how many a strike could have chosen from,
     "seconds": how long it ran}

A *strike* hits the child at a moment, ``{"kind": "kill", "moment": 0.3}``, or at an operation on
files; see `strikes.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import jobs
import strikes

_POLL_SECONDS = 0.002
_PYTHON_FAILED = 99
"""Exit code of a child whose job raised something that is not an error of qcompile."""


def main() -> None:
    """Answers requests until stdin ends."""
    jobs.warm_up(Path(sys.argv[1]))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    receiver, sender = os.pipe()
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.close(receiver)
        _be_the_child(request, sender)
    os.close(sender)
    status = _wait(child, request, started)
    seconds = time.perf_counter() - started
    with open(receiver, encoding="utf-8") as pipe:
        said = pipe.read()
    return {"status": status, "seconds": seconds, **(json.loads(said) if said else {})}


def _wait(child: int, request: dict[str, Any], started: float) -> int | None:
    """The exit code of the child; strikes it when its moment has come, kills it when it hangs."""
    strike = request.get("strike") or {}
    moment, timeout = strike.get("moment"), request["timeout"]
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        passed = time.perf_counter() - started
        if passed > timeout:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        if moment is not None and passed >= moment:
            os.kill(child, strikes.SIGNALS[strike["kind"]])
            moment = None
        time.sleep(_POLL_SECONDS)


def _be_the_child(request: dict[str, Any], sender: int) -> None:
    """Runs the job and ends this process, without what Python does at its end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    # Low numbers are spared by the full disk, and so is the pipe that the result goes into.
    os.dup2(sender, strikes.LAST_SPARED_DESCRIPTOR)
    if request.get("memory") is not None:
        _limit_memory(request["memory"])
    job: Callable[..., Any] = getattr(jobs, request["job"])
    counter = strikes.prepare(request.get("strike"))
    status, result = _PYTHON_FAILED, None
    try:
        result = job(**request["arguments"])
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        counter.rest()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        said = json.dumps({"result": result, "operations": counter.operations})
        os.write(strikes.LAST_SPARED_DESCRIPTOR, said.encode())
        os._exit(status)


def _limit_memory(allowance: int) -> None:
    """Lets the address space grow by no more than `allowance` bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + allowance
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
