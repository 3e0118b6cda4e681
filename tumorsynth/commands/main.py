"""The command line: puts the commands together and turns errors into one line and an exit code.

Exit codes: 0, everything succeeded; 1, one of several scans failed, no scan got a tumour, the
machine failed, or an unexpected error; 2, a wrong command or input; 130, Ctrl-C. Errors are one
line on stderr; ``--debug`` shows the traceback instead. Commands import torch only when they run,
so that ``--help`` is quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

try:
    import rich  # noqa: F401
    import typer
except ModuleNotFoundError as error:
    sys.exit(f'tumorsynth: no {error.name}: the commands need pip install "tumorsynth[cli]"')

import tumorsynth
from tumorsynth.commands import nnunet, reader_study
from tumorsynth.commands.bench import bench
from tumorsynth.commands.convert import convert
from tumorsynth.commands.demo import demo
from tumorsynth.commands.evaluate import evaluate, healthy
from tumorsynth.commands.follow_up import SeriesCommand
from tumorsynth.commands.info import info
from tumorsynth.commands.replay import replay
from tumorsynth.commands.shared import fail
from tumorsynth.commands.synthesize import synthesize
from tumorsynth.scans.errors import describe_error, exit_code

TYPER_FLOOR = "0.20"  # as in pyproject.toml, which an installation without dependencies ignores

app = typer.Typer(
    help="Synthetic tumours for 3-D CT, image and label.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        argv: the words after ``tumorsynth``; by default those of this process.
    """
    if argv is None:  # the process is ours
        wait_passively()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if debug:  # allowed anywhere, but the commands expect it first
        arguments = ["--debug", *(a for a in arguments if a != "--debug")]
    for stream in (sys.stdout, sys.stderr):  # file names may hold bytes that are no text
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if "" in arguments:
        return fail("an argument is empty; check that the shell variable it comes from is set", 2)
    try:
        code = typer.main.get_command(app).main(
            arguments, prog_name="tumorsynth", standalone_mode=False
        )
    except (typer.Abort, KeyboardInterrupt):
        return fail("stopped", 130)
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        if hasattr(error, "format_message"):  # typer's own: unknown option, missing argument
            return fail(_describe_usage_error(error, arguments), 2)
        if isinstance(error, TypeError | AttributeError) and _typer_is_too_old():  # typer's own
            return fail(
                f"typer {typer.__version__} is installed, but the commands need typer "
                f'{TYPER_FLOOR} or later: pip install --upgrade "tumorsynth[cli]"',
                1,
            )
        return fail(describe_error(error), exit_code(error))
    if code == 130:  # how typer reports Ctrl-C
        return fail("stopped", 130)
    code = code if isinstance(code, int) else 0
    if argv is None:
        _leave_process_group(code)
    return code


def _typer_is_too_old() -> bool:
    installed, floor = (v.split(".")[:2] for v in (typer.__version__, TYPER_FLOOR))
    return [int(n) for n in installed] < [int(n) for n in floor]


def _leave_process_group(code: int) -> None:
    """End a process of a distributed training at once.

    The threads of its process group sometimes abort the interpreter's own shutdown, after all files
    are written.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available():
        return
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_passively() -> None:
    """Make torch's CPU threads sleep while they wait for each other.

    Spinning threads run several times slower beside another busy program. OpenMP reads the variable
    when torch is loaded, so this has to come first; a setting of the user's stays.
    """
    if "GOMP_SPINCOUNT" not in os.environ and "KMP_BLOCKTIME" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _describe_usage_error(error: Exception, arguments: Sequence[str]) -> str:
    words = error.format_message().rstrip(".")  # type: ignore[attr-defined]
    options = [getattr(error, "option_name", None)]
    options += getattr(getattr(error, "param", None), "opts", [])
    if (
        "--contrast-hu" in options
    ):  # contrast_hu= of the library takes names, so users try them here
        words += "; give LOW HIGH in HU, or a name such as liver-portal to --contrast-prior"
    context = getattr(error, "ctx", None)
    path = _command_path(arguments) if context is None else context.command_path
    return f"{words}; see {path} --help"


def _command_path(arguments: Sequence[str]) -> str:
    command: Any = typer.main.get_command(app)
    path = ["tumorsynth"]
    for word in arguments:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            break
        path.append(word)
    return " ".join(path)


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks. Allowed anywhere on the line.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(tumorsynth.__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


app.command(cls=SeriesCommand)(synthesize)
app.command()(replay)
app.command()(demo)
app.command()(convert)
app.command()(info)


@app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def train(
    words: Annotated[list[str] | None, typer.Argument(metavar="COMMAND ...")] = None,
) -> None:
    """Train a generator: autoencoder, denoiser, pack; or make a bank of lesions: bank."""
    from tumorsynth.commands.train import app as commands  # imports torch

    command = typer.main.get_command(commands)
    command.main(words or ["--help"], prog_name="tumorsynth train", standalone_mode=False)


app.command()(evaluate)
app.command()(healthy)
app.command()(bench)
app.add_typer(nnunet.app, name="nnunet")
app.add_typer(reader_study.app, name="reader-study")


if __name__ == "__main__":
    sys.exit(main())
