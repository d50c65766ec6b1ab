"""What all command lines share: the words, and how errors end them."""

import argparse
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from utils.errors import UserError

EXIT_USER_ERROR = UserError.exit_code
EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Argument parser that shows defaults, keeps the layout of epilogs, and errs in one line."""

    def __init__(self, *, description: str, example: str, prog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As argparse does, but ``--k -1e-3`` is a number, too, and no word may be empty.

        (An empty path, from a variable that is not set, would be the current folder.)
        """
        words: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            option, has_value, value = word.partition("=")
            if not word or (option.startswith("--") and has_value and not value):
                self.error(f"{option or 'one of the words'} is empty: a variable that is not set?")
            if words and _is_option(words[-1]) and word.startswith("-") and _is_number(word):
                words[-1] += f"={word}"
            else:
                words.append(word)
        return super().parse_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        self.exit(EXIT_USER_ERROR, f"error: {message} (see {self.prog} --help)\n")


def _is_option(word: str) -> bool:
    return word.startswith("--") and "=" not in word


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults in the help of each option; the epilog's line breaks are kept."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        if isinstance(action.default, (list, tuple)):
            words = " ".join(map(str, action.default)).replace("%", "%%")
            return f"{action.help} (default: {words})"
        return super()._get_help_string(action)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and exit: with its code, with 2 and one line for wrong input.

    A ValueError or OSError is the user's to put right (a bad value, a missing or unwritable file);
    anything else is a defect and keeps its traceback. PCSR_TRACEBACK=1 shows them all.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # Names of files that a terminal's or a pipe's encoding has no characters for are escaped.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main()
    except (UserError, ValueError, OSError) as error:
        if os.environ.get("PCSR_TRACEBACK"):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(getattr(error, "exit_code", EXIT_USER_ERROR))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(code or 0)


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = str(error)
    if "Original Traceback" in text:
        # A loader process sends its error as a traceback; the last line holds the message.
        text = text.rstrip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split()) or type(error).__name__


def finite_float(text: str) -> float:
    """`type=` of an option that takes any number but nan and the infinities."""
    return _number(text, math.isfinite, "a finite number")


def positive_float(text: str) -> float:
    """`type=` of an option that takes a finite number above 0."""
    return _number(text, lambda value: math.isfinite(value) and value > 0, "a number above 0")


def positive_int(text: str) -> int:
    """`type=` of an option that takes a whole number from 1 on."""
    return int(_number(text, lambda value: value >= 1, "a whole number, at least 1", int))


def natural_int(text: str) -> int:
    """`type=` of an option that takes a whole number from 0 on."""
    return int(_number(text, lambda value: value >= 0, "a whole number, at least 0", int))


def _number(
    text: str,
    is_good: Callable[[float], bool],
    expected: str,
    convert: Callable[[str], float] = float,
) -> float:
    try:
        value = convert(text)
        good = is_good(value)
    except (ValueError, OverflowError):
        good = False
    if not good:
        raise argparse.ArgumentTypeError(f"expected {expected}, not `{text}`")
    return value


def add_config_words(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """``--config`` and ``--set``."""
    parser.add_argument(
        "--config", required=required, metavar="YAML", help="Config file, see configs/."
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY.PATH=VALUE",
        help="Override one key of the config; may be given several times.",
    )


def add_device_words(parser: argparse.ArgumentParser) -> None:
    """``--device`` and its older alias ``--gpu``."""
    parser.add_argument(
        "--device",
        default="auto",
        help="Where to compute: auto (the best there is), cpu, cuda, cuda:N or mps.",
    )
    parser.add_argument("--gpu", metavar="N", help="GPU index; the same as --device cuda:N.")


def check_device_words(args: argparse.Namespace) -> None:
    """Refuse ``--gpu`` beside a different ``--device``."""
    if args.gpu is not None and args.device not in ("auto", "cuda", f"cuda:{args.gpu}"):
        raise UserError(f"--gpu {args.gpu} and --device {args.device} contradict each other")
