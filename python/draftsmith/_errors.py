"""How a verb ends when it does not end well."""

from __future__ import annotations

from typing import Any, Sequence, Tuple

BAD_INPUT = 2


class Error(Exception):
    """The program ended with an error.

    `message` says what is wrong, `hint` what to do about it (or `None`), `exit_code` is the program's: 2 where the input was
    wrong, 101 for a bug, 130 where it was interrupted, negative where a signal ended it. `command` is what was run.
    """

    def __init__(
        self, message: str, hint: str | None = None, *, exit_code: int = BAD_INPUT, command: Sequence[str] = ()
    ) -> None:
        super().__init__(message if hint is None else f"{message}\nhint: {hint}")
        self.message = message
        self.hint = hint
        self.exit_code = exit_code
        self.command = tuple(command)
        #: Further errors of the same input: pairs of message and hint.
        self.others: Tuple[Tuple[str, str | None], ...] = ()

    def __str__(self) -> str:
        told = [(self.message, self.hint), *self.others]
        return "\n".join(message if hint is None else f"{message}\nhint: {hint}" for message, hint in told)

    def __reduce__(self) -> Tuple[Any, ...]:
        # Exceptions are made again from their arguments where they cross processes; ours are not those of `Exception`.
        return (_again, (type(self), self.__dict__.copy()))


class NotHeld(Error):
    """The verb did its work, and what it was to check does not hold: an answer with the draft differs, for example.

    `result` is what the verb printed, as JSON reads it.
    """

    def __init__(self, message: str, hint: str | None = None, *, result: Any = None, command: Sequence[str] = ()) -> None:
        super().__init__(message, hint, exit_code=1, command=command)
        self.result = result


def _again(kind: type[Error], fields: dict[str, Any]) -> Error:
    error = kind(fields["message"], fields["hint"])
    error.__dict__.update(fields)
    return error


def from_stderr(lines: Sequence[str], exit_code: int, command: Sequence[str]) -> Error:
    """Reads the `error:` and `hint:` lines that the program ends with."""
    told: list[tuple[str, str | None]] = []
    for line in lines:
        if line.startswith("error: "):
            told.append((line[len("error: ") :], None))
        elif line.startswith("hint: ") and told:
            told[-1] = (told[-1][0], line[len("hint: ") :])
    if not told:
        last = next((line for line in reversed(lines) if line.strip()), "it wrote nothing")
        told.append((f"the program ended with exit code {exit_code}: {last}", None))
    message, hint = told[0]
    error = Error(message, hint, exit_code=exit_code, command=command)
    error.others = tuple(told[1:])
    return error
