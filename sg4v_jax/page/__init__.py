"""Pages that this library writes: one file each, no network, light and dark, everything escaped."""
