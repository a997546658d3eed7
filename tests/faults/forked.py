# SPDX-License-Identifier: Apache-2.0
"""Runs many command lines of launch.train in one go: imports once, then one fork for each.

Reads a JSON list of argument lists from stdin; writes one JSON object per line to stdout with the
exit code, what went to stderr, and the seconds it took after the imports. Every command runs as the
real launcher does, from parsing its flags to leaving the process.
"""

import json
import os
import sys
import tempfile
import time

import attnjax.train.loop  # noqa: F401  (everything that the launcher imports later)
from launch import command, train

LIMIT = 60
"""Seconds after which a command is given up."""


def run(arguments: list[str]) -> dict:
    """Run one command in a child process."""
    with tempfile.TemporaryFile("w+") as errors, open(os.devnull, "w") as nowhere:
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), 2)
            os.dup2(nowhere.fileno(), 1)
            sys.argv = ["train", *arguments]
            code = 99
            try:
                command.run(train.main)
            except SystemExit as end:
                code = end.code or 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        seconds = time.monotonic() - start
        errors.seek(0)
        code = os.waitstatus_to_exitcode(status)
        return {"code": code, "errors": errors.read(), "seconds": seconds}


if __name__ == "__main__":
    for arguments in json.load(sys.stdin):
        print(json.dumps(run(arguments)), flush=True)
