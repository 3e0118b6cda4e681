"""``tumorsynth info`` and ``convert``: what a generator is, and one made of published files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tumorsynth.commands.shared import Overwrite, plain


def convert(
    autoencoder: Annotated[Path, typer.Argument(help="The published AutoencoderModel.ckpt.")],
    denoiser: Annotated[Path, typer.Argument(help="A published denoiser: liver_early.pt, ...")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The generator folder to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Turn published checkpoints into a generator.

    Reads the published DiffTumor files and writes a folder of safetensors and a card, to be used
    with --generator FOLDER. Nothing in the checkpoints is executed. The published weights may not
    be redistributed, converted or not.
    """
    for path in (autoencoder, denoiser):
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
    if (out / "card.json").exists() and not overwrite:
        raise ValueError(f"{out} holds a generator; choose another folder or add --overwrite")
    from tumorsynth.generator import Generator

    Generator.from_difftumor(autoencoder, denoiser).save(out)
    print(f"wrote {out}; use it with --generator {out}")


def info(
    name: Annotated[
        str | None, typer.Argument(help="Bundled name, generator folder or hub id.")
    ] = None,
) -> None:
    """Show and check a generator, or list all.

    Prints the card of NAME after checking its files against it; without NAME, the bundled ones.
    """
    from tumorsynth import weights

    names = weights.bundled_names() if name is None else [name]
    for each in names:
        generator = weights.load_generator(each)  # which checks the files against the card
        card = {k: v for k, v in generator.card.items() if k not in ("format", "config")}
        if name is None:
            default = "  (default)" if each == weights.default_generator() else ""
            words = card.get("description") or card.get("source", "")
            print(f"{each}{default}: {plain(words)}")
            continue
        if each != weights.HANDCRAFTED:
            parts = {k: getattr(generator, k) for k in ("autoencoder", "denoiser")}
            card["parameters"] = {
                k: f"{sum(p.numel() for p in part.parameters()):,}" for k, part in parts.items()
            }
            folder = weights.find_folder(each)
            card["file"] = f"{(folder / weights.MODEL).stat().st_size / 1e6:.1f} MB, sha256 agrees"
        _print_card(card)


def _print_card(value: dict[str, Any], indent: str = "") -> None:
    for key, entry in value.items():
        title = indent + plain(key).replace("_", " ")
        if isinstance(entry, dict):
            print(f"{title}:")
            _print_card(entry, indent + "  ")
        elif isinstance(entry, (list, tuple)) and any(isinstance(e, (dict, str)) for e in entry):
            print(f"{title}:")
            for item in entry:
                print(f"{indent}  - {plain(item)}")
        else:
            print(f"{title}: {plain(entry)}")
