"""`python -m vqvae_lightning.train`, for `torchrun -m`: the same as `vqvae-train`."""

from vqvae_lightning.commands.train import main

if __name__ == "__main__":
    main()
