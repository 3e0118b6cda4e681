"""The networks of a diffusion generator (autoencoder, codebook, denoisers) and their layers."""
