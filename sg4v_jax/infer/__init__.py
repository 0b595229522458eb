"""The engine: what generates and scores answers."""
