"""The FLUX.1 networks: transformer, autoencoder, text encoders and the sampling loop."""
