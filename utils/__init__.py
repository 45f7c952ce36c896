"""How the model is trained."""
