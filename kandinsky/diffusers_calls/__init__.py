"""diffusers' four Kandinsky 5 pipelines by name, over ours: see pipelines.py."""
