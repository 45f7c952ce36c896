"""What the models share: stages, autoencoders, text encoders, weights, key layouts."""
