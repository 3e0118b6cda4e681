"""Training of generators: never imported by inference."""
