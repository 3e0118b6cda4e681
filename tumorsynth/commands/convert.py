"""``tumorsynth convert``: make a generator from published DiffTumor checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tumorsynth.commands.shared import Overwrite


def convert(
    autoencoder: Annotated[Path, typer.Argument(help="The published AutoencoderModel.ckpt.")],
    denoiser: Annotated[
        Path, typer.Argument(help="A published denoiser, for example liver_early.pt.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Generator folder to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Convert published DiffTumor checkpoints into a generator.

    Writes a folder of safetensors and a card, for --generator FOLDER. Executes nothing that the
    checkpoints contain. You may not redistribute the published weights, converted or not.
    """
    for path in (autoencoder, denoiser):
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
    if (out / "card.json").exists() and not overwrite:
        raise ValueError(f"{out} holds a generator; choose another folder or add --overwrite")
    from tumorsynth.generators.diffusion import Generator

    Generator.from_difftumor(autoencoder, denoiser).save(out)
    print(f"wrote {out}; use it with --generator {out}")
