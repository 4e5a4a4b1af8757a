"""Autograd functions beside the plain paths that they must equal. Only `vit2dpe.attention` calls them."""
