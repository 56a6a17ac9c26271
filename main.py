"""Teach SDXL the style of your own pictures with a LoRA, and draw new pictures in that style.

python main.py --mode train
python main.py --mode inference
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NoReturn

INSTALL = "{} is not installed: run `make install && source .venv/bin/activate`, or `pip install -r requirements.txt`"
NOT_TO_INSTALL = {
    "lace_lora": "Python does not search main.py's own folder: unset PYTHONSAFEPATH, and do not use -P or -I",
    "fcntl": "this program needs Linux or macOS: on Windows, run it in WSL",
}


def missing_module(error: ModuleNotFoundError) -> str:
    return NOT_TO_INSTALL.get(str(error.name), INSTALL.format(error.name))


try:
    from lace_lora import console, drive
    from lace_lora.config import describe, load_config, not_utf8
    from lace_lora.errors import BAD_INPUT, DISK_OR_DRIVE, UserError, explain
except ModuleNotFoundError as missing:
    print(f"error: {missing_module(missing)}", file=sys.stderr)
    sys.exit(2)

SETTINGS = """settings (set them in config.yaml, or as key=value on the command line; an empty value means not set):

{}

exit codes: 0 done, 2 invalid input, 3 out of memory, 4 disk or Drive error, 5 loss or picture not finite (NaN or inf),
            130 or 143 stopped (run the same command again to resume), 1 a bug"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run one mode; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return 0
    options = parser.parse_intermixed_args(arguments)
    before = signal.signal(signal.SIGTERM, _stop)  # handled like Ctrl-C
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns about torchvision, which nothing here needs
    # On a CPU shared with another program, OpenMP threads waste time spinning at barriers: spin less.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        _check_surroundings(options.config)
        config = load_config(options.config, options.overrides)
        drive.ensure_mounted(config)
        if options.mode == "train":
            import train

            train.run(config, options.dry_run)
        else:
            import inference

            inference.run(config, options.dry_run)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        advice = "close other programs, or choose a machine with more memory"
        explained = error if isinstance(error, UserError) else explain(error, advice)
        if explained is None:
            raise
        stopped = explained.exit_code in (130, 143)
        print(str(explained) if stopped else f"error: {explained}", file=sys.stderr)
        return explained.exit_code
    except ModuleNotFoundError as error:
        print(f"error: {missing_module(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as stop:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)  # in a notebook, the process continues
    return 0


def _check_surroundings(settings_file: str) -> None:
    """Raises UserError: Python drops docstrings, a folder is missing, or a path is not UTF-8."""
    if sys.flags.optimize > 1:
        raise UserError("transformers does not work without docstrings: unset PYTHONOPTIMIZE, and do not use -OO")
    try:
        current = os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder has been deleted: change to another one with `cd`") from None
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError:
        advice = "free some disk space, or set the environment variable TMPDIR to a folder that you can write to"
        raise UserError(f"temporary files cannot be written anywhere: {advice}", DISK_OR_DRIVE) from None
    for name, path in (("--config", settings_file), ("the current folder", current), ("TMPDIR", temporary)):
        if reason := not_utf8(path):
            raise UserError(f"{name}: {path!r} {reason}")


def _stop(number: int, _frame: Any) -> None:
    raise KeyboardInterrupt(number)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(str(UserError(message)))  # UserError redacts secrets


def build_parser() -> argparse.ArgumentParser:
    as_is = argparse.RawDescriptionHelpFormatter
    parser = _Parser("python main.py", description=__doc__, epilog=SETTINGS.format(describe()), formatter_class=as_is)
    parser.add_argument(
        "--mode", choices=("train", "inference"), required=True, help="train the LoRA, or draw pictures with it"
    )
    parser.add_argument("--config", default="config.yaml", help="settings file (default: config.yaml)")
    dry_run = "check settings and pictures, print what would be done, write nothing but `report` and `preview`"
    parser.add_argument("--dry-run", action="store_true", help=dry_run)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a setting for this run")
    return parser


if __name__ == "__main__":
    console.protect()
    sys.exit(main())
