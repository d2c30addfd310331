"""Makes `models/demo`: `bank` of scenes -> `dense` -> `text` in stages -> `score` -> card (`__main__`, one command)."""
