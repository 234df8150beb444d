"""The discrete VAE, stage 1 of the image decoder: model, codes, training and storage."""
