"""Training a small diffusion model with the stable target field."""
