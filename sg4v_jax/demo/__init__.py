"""The whole loop on the embedded world: the project's main job in small."""
