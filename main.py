"""Teach SDXL a style from your own pictures with a LoRA, and draw new ones with it.

python main.py --mode train
python main.py --mode inference
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from lace_lora.errors import BAD_INPUT, UserError, explain

INSTALL = "{} is not installed: source .venv/bin/activate after make install, or pip install -r requirements.txt"
try:
    from lace_lora import drive
    from lace_lora.config import describe, load_config
except ModuleNotFoundError as missing:
    print(f"error: {INSTALL.format(missing.name)}", file=sys.stderr)
    sys.exit(BAD_INPUT)

SETTINGS = """settings (in config.yaml, or key=value on the command line; empty means none):

{}

exit codes: 0 done, 2 something in the input is wrong, 3 out of memory, 4 disk or Drive, 5 loss not finite,
            130 or 143 stopped and resumable, 1 a bug"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run one mode; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return 0
    options = parser.parse_intermixed_args(arguments)
    before = signal.signal(signal.SIGTERM, _stop)  # as Ctrl-C
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns about torchvision, which nothing here needs
    # On a CPU that another program uses too, PyTorch's threads wait for each other in vain: not so long.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
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
        print(f"error: {INSTALL.format(error.name)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as stop:
        print("stopped; run the same command again to draw the rest", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)  # a notebook's process lives on
    return 0


def _stop(number: int, _frame: Any) -> None:
    raise KeyboardInterrupt(number)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(str(UserError(message)))  # which repeats no secret


def build_parser() -> argparse.ArgumentParser:
    as_is = argparse.RawDescriptionHelpFormatter
    parser = _Parser("python main.py", description=__doc__, epilog=SETTINGS.format(describe()), formatter_class=as_is)
    parser.add_argument(
        "--mode", choices=("train", "inference"), required=True, help="teach the style, or draw with it"
    )
    parser.add_argument("--config", default="config.yaml", help="settings file (default: config.yaml)")
    parser.add_argument(
        "--dry-run", action="store_true", help="check settings and pictures, say what would be done, write nothing"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set a setting for this run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
