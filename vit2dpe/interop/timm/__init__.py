"""timm models to ours and back."""
