"""What to launch: `get_config(size)` files for ml_collections, as in configs/."""
