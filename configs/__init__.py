"""Run configurations: `get_config(arg)` files for ml_collections."""
