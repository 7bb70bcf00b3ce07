"""The trained model as a Hugging Face directory, and the proof that it is the same model."""
