"""How it is estimated: PyTorch, without ART and without files."""
