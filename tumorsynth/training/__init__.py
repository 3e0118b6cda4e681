"""Training of generators; synthesis never imports this package."""
