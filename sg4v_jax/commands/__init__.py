"""The `sg4v` command, one file per sub-command. They parse, and call the room that does the work."""
