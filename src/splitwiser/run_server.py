"""Runs ``splitwiser`` commands one after another in one process, which has imported PyTorch and transformers once.

Run as a program by :class:`splitwiser.study.fresh_runs.OneProcess`: each line of stdin is a JSON object, ``arguments`` of a
command and the ``log`` that gets what it prints; each is answered on stdout with the command's exit code. A command that
failed or was interrupted is the process's last: what it has left behind must not reach another.
"""

import json
import os
import sys

from splitwiser.cli import main


def serve() -> None:
    """Answer commands until stdin ends or one does not end well."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="ascii")
    for line in sys.stdin:
        asked = json.loads(line)
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log, stream.fileno())
        os.close(log)
        code = main(asked["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
        print(code, file=answers, flush=True)
        if code:
            return


if __name__ == "__main__":
    serve()
