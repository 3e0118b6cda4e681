"""``tumorsynth nnunet``: where nnU-Net finds the trainer."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="Print the trainer folder for nnU-Net v2, or install the trainer there.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def path() -> None:
    """Print the folder for the variable nnUNet_extTrainer (nnU-Net 2.8 and later)."""
    from tumorsynth.nnunet import shim

    print(shim.folder())


@app.command()
def install() -> None:
    """Copy the trainer's shim to the trainers of the installed nnU-Net (2.5 and later)."""
    from tumorsynth.nnunet import shim

    print(shim.install())
