"""The two networks of a diffusion generator: autoencoder (with its codebook) and denoiser."""
