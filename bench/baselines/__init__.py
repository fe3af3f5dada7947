"""What the decoders are compared with: published code, and loops that do what it does."""
