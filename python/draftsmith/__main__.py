"""`python -m draftsmith` is `draftsmith`, where the folder of scripts is not on the path."""

import os
import subprocess
import sys

from ._errors import Error
from ._program import program


def main() -> int:
    try:
        command = [str(program()), *sys.argv[1:]]
    except Error as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    if os.name == "posix":
        os.execv(command[0], command)
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
