"""The command line: puts the commands together, and turns errors into one line and an exit code.

Exit codes: 0 all done; 1 a scan of several failed, none got a tumour, the machine failed, or
something unexpected happened; 2 a wrong command or input; 130 Ctrl-C. Errors are one line on
stderr; ``--debug`` shows the traceback instead. torch is imported by the commands that need it, so
that ``--help`` is quick.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

try:
    import rich  # noqa: F401
    import typer
except ModuleNotFoundError as error:
    sys.exit(f'tumorsynth: no {error.name}: the commands need pip install "tumorsynth[cli]"')

import tumorsynth
from tumorsynth.commands.bench import bench
from tumorsynth.commands.demo import demo
from tumorsynth.commands.evaluate import evaluate, healthy
from tumorsynth.commands.generators import convert, info
from tumorsynth.commands.reader_study import app as reader_study
from tumorsynth.commands.replay import replay
from tumorsynth.commands.shared import fail
from tumorsynth.commands.synthesize import synthesize
from tumorsynth.scans.collection import exit_code, one_line

app = typer.Typer(
    help="Realistic synthetic tumours for 3-D CT, image and label.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code. Expected errors become one line on stderr."""
    if argv is None:  # the process is ours
        wait_passively()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if debug:  # wherever it stands: the commands see it in front
        arguments = ["--debug", *(a for a in arguments if a != "--debug")]
    for stream in (sys.stdout, sys.stderr):  # a file's name may hold what no text may
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if "" in arguments:
        return fail("an argument is empty; is a variable of the shell not set?", 2)
    try:
        code = typer.main.get_command(app).main(
            arguments, prog_name="tumorsynth", standalone_mode=False
        )
    except (typer.Abort, KeyboardInterrupt):
        return fail("stopped", 130)
    except BrokenPipeError:  # whoever read our output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        if hasattr(error, "format_message"):  # typer's own: unknown option, missing argument
            place = getattr(getattr(error, "ctx", None), "command_path", "tumorsynth")
            words = error.format_message().rstrip(".")
            if "--contrast-hu" in words:  # a name, as contrast_hu= takes, is no number
                words += "; it takes LOW HIGH in HU, --contrast-prior takes names as liver-portal"
            return fail(f"{words}; see {place} --help", 2)
        return fail(one_line(error), exit_code(error))
    if code == 130:  # typer's own way of saying so
        return fail("stopped", 130)
    return code if isinstance(code, int) else 0


def wait_passively() -> None:
    """Have torch's CPU threads sleep while they wait for each other, unless the environment says
    how they wait: beside another busy program spinning makes them several times slower.

    OpenMP reads the variable when torch is loaded, so it has to come first.
    """
    if "GOMP_SPINCOUNT" not in os.environ and "KMP_BLOCKTIME" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere on the line.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(tumorsynth.__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


app.command()(synthesize)
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
    """Train a generator: autoencoder, denoiser, pack."""
    from tumorsynth.commands.train import app as commands  # not before: inference needs none of it

    command = typer.main.get_command(commands)
    command.main(words or ["--help"], prog_name="tumorsynth train", standalone_mode=False)


app.command()(evaluate)
app.command()(healthy)
app.command()(bench)

nnunet = typer.Typer(
    help="The trainer for nnU-Net v2: where it is, or a copy.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(nnunet, name="nnunet")
app.add_typer(reader_study, name="reader-study")


@nnunet.command()
def path() -> None:
    """Print the folder for the variable nnUNet_extTrainer (nnU-Net 2.8 and later)."""
    from tumorsynth.nnunet import shim

    print(shim.folder())


@nnunet.command()
def install() -> None:
    """Copy the trainer's shim among the trainers of the installed nnU-Net (2.5 and later)."""
    from tumorsynth.nnunet import shim

    print(shim.install())


if __name__ == "__main__":
    sys.exit(main())
