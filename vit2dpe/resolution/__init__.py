"""Resolution policies, applying them to a model, and the sweep over sizes."""
