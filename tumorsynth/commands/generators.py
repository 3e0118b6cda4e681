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
    from tumorsynth.generators.diffusion import Generator

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
    from tumorsynth.generators import store
    from tumorsynth.generators.folder import read_card

    names = store.bundled_names() if name is None else [name]
    if name is not None and name != store.HANDCRAFTED:
        folder = store.find_folder(name)
        if read_card(folder).get("kind") == "autoencoder":
            _print_card(_of_autoencoder(name, folder))
            return
    for each in names:
        generator = store.load_generator(each)  # which checks the files against the card
        card = {k: v for k, v in generator.card.items() if k not in ("format", "config")}
        if name is None:
            default = "  (default)" if each == store.default_generator() else ""
            words = card.get("description") or card.get("source", "")
            print(f"{each}{default}: {plain(words)}")
            continue
        if each != store.HANDCRAFTED:
            parts = {k: getattr(generator, k) for k in ("autoencoder", "denoiser")}
            card["parameters"] = {
                k: f"{sum(p.numel() for p in part.parameters()):,}" for k, part in parts.items()
            }
            folder = store.find_folder(each)
            card["file"] = _file(folder, card)
        _print_card(card)


def _of_autoencoder(name: str, folder: Path) -> dict[str, Any]:
    """What to print of the folder of `tumorsynth train autoencoder`, after checking it."""
    from tumorsynth.training.folders import read_autoencoder

    autoencoder, card = read_autoencoder(name)
    shown = {k: v for k, v in card.items() if k not in ("format", "config")}
    shown["parameters"] = f"{sum(p.numel() for p in autoencoder.parameters()):,}"
    shown["file"] = _file(folder, card)
    return shown


def _file(folder: Path, card: dict[str, Any]) -> str:
    from tumorsynth.generators.folder import MODEL

    words = f"{(folder / MODEL).stat().st_size / 1e6:.1f} MB, sha256 agrees"
    if "config_sha256" in card:
        return words
    return words + "; no config_sha256, so that a changed config would not be seen: save it anew"


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
