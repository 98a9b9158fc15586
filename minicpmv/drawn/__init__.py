"""Images and questions that the repository draws itself: for training, and for NanoBench."""
