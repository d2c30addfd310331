"""From recordings, datasets and rendered scenes to a checkpoint that knows metres."""
