"""The web page of `minicpmv web`: `conversation` holds what is said, `view` draws what the model sees, `page` lays it out."""
