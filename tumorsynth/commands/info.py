"""``tumorsynth info``: list the bundled generators, or check one and print its card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tumorsynth.commands.shared import printable

HIDDEN = ("format", "config")  # entries of a card that say nothing to a reader


def info(
    name: Annotated[
        str | None,
        typer.Argument(help="Bundled name, generator folder, hub id or bank of lesions."),
    ] = None,
) -> None:
    """List the bundled generators, or check and describe one.

    With NAME, checks the generator's files against its card and prints the card.
    """
    from tumorsynth.generators import store
    from tumorsynth.generators.bank import is_bank

    if name is None:
        for bundled in store.bundled_names():
            _print_line(bundled)
    elif name == store.HANDCRAFTED or is_bank(name):
        _print_card(_shown(store.load_generator(name).card))
    else:
        folder = store.find_folder(name)
        if store.read_card(folder).get("kind") == "autoencoder":
            _print_card(_describe_autoencoder(name, folder))
        else:
            _print_card(_describe_generator(name, folder))


def _print_line(name: str) -> None:
    from tumorsynth.generators import store

    card = store.load_generator(name).card  # loading checks the files against the card
    default = "  (default)" if name == store.default_generator() else ""
    print(f"{name}{default}: {printable(card.get('description') or card.get('source', ''))}")


def _describe_generator(name: str, folder: Path) -> dict[str, Any]:
    from tumorsynth.generators.store import load_generator

    generator = load_generator(name)
    card = _shown(generator.card)
    networks = {key: getattr(generator, key) for key in ("autoencoder", "denoiser")}
    card["parameters"] = {key: _parameters(network) for key, network in networks.items()}
    card["file"] = _describe_file(folder, card)
    return card


def _describe_autoencoder(name: str, folder: Path) -> dict[str, Any]:
    """For the folder that `tumorsynth train autoencoder` writes."""
    from tumorsynth.training.folders import read_autoencoder

    autoencoder, full_card = read_autoencoder(name)
    card = _shown(full_card)
    card["parameters"] = _parameters(autoencoder)
    card["file"] = _describe_file(folder, card)
    return card


def _shown(card: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in card.items() if key not in HIDDEN}


def _parameters(network: Any) -> str:
    return f"{sum(p.numel() for p in network.parameters()):,}"


def _describe_file(folder: Path, card: dict[str, Any]) -> str:
    from tumorsynth.generators.folder import MODEL

    words = f"{(folder / MODEL).stat().st_size / 1e6:.1f} MB, sha256 agrees"
    if "config_sha256" in card:
        return words
    return f"{words}; no config_sha256, so a changed config would go unnoticed; save it again"


def _print_card(value: dict[str, Any], indent: str = "") -> None:
    for key, entry in value.items():
        title = indent + printable(key).replace("_", " ")
        if isinstance(entry, dict):
            print(f"{title}:")
            _print_card(entry, indent + "  ")
        elif isinstance(entry, (list, tuple)) and any(isinstance(e, (dict, str)) for e in entry):
            print(f"{title}:")
            for item in entry:
                print(f"{indent}  - {printable(item)}")
        else:
            print(f"{title}: {printable(entry)}")
