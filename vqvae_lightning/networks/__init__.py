"""Plain torch modules, without Lightning.

- `autoencoder`: the VQ-VAE, from its encoder to its decoder.
- `pixelcnn`: the prior over grids of codes.
- `pixel_decoder`: the autoregressive decoder, a PixelCNN over pixels.
- `sampling`: drawing codes from a prior or pixels from a decoder, and their likelihood.
- `classifier`: the judge of class-conditional samples.
- `dropout`: dropout that gives the same results on any number of devices.
"""
