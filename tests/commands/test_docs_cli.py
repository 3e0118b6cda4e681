"""docs/cli.md says what the commands say."""

from __future__ import annotations

import runpy
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "_cli.py"


def test_the_page_of_the_command_line_is_up_to_date():
    written = runpy.run_path(str(SCRIPT))
    assert written["PAGE"].read_text(encoding="utf-8") == written["page"](), (
        "run: python docs/_cli.py"
    )


def test_every_command_and_option_is_on_the_page():
    from tumorsynth.commands.main import app, typer
    from tumorsynth.commands.train import app as train

    text = SCRIPT.with_name("cli.md").read_text(encoding="utf-8")
    found = 0
    for name, group in typer.main.get_command(app).commands.items():
        group = typer.main.get_command(train) if name == "train" else group
        below = getattr(group, "commands", {"": group})
        for sub, command in below.items():
            heading = f"# tumorsynth {name} {sub}".rstrip() + "\n"
            section = text.split(heading)[1].split("\n#")[0]
            options = [o for p in command.params for o in p.opts if o.startswith("-")]
            for option in set(options) - {"--help"}:
                assert f"`{option}`" in section, (heading, option)
                found += 1
    assert found > 100
