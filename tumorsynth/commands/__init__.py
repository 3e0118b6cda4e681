"""The commands of ``tumorsynth``, one file for each job; `tumorsynth.commands.main` puts them together."""
