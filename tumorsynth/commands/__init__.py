"""The command line, one file per command; `tumorsynth.commands.main` puts them together."""
