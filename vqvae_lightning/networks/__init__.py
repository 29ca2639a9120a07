"""Plain torch modules, without Lightning.

- `autoencoder`: the VQ-VAE, from its encoder to its decoder.
- `pixelcnn`: the prior over grids of codes.
- `sampling`: drawing codes from a prior, and their likelihood.
- `classifier`: the judge of class-conditional samples.
- `dropout`: dropout that gives the same results on any number of devices.
"""
