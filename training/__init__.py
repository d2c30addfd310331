"""From rendered scenes to a checkpoint: `raycast` -> `scenes` -> `data` -> `dense` / `sft` -> `demo` (one command)."""
