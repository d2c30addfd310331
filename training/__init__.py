"""From rendered scenes to a checkpoint: `scenes` -> `data` -> `dense` / `sft` -> `demo` (one command)."""
