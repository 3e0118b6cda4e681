"""The commands of ``tumorsynth``, one file for each job; `tumorsynth.cli` puts them together."""
