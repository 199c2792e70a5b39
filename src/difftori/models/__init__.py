"""Neural networks: plain layers, encoders and world models."""
