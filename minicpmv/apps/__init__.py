"""What people do with the model, as libraries: read documents, find things in images, describe videos.

All take any model and processor of this architecture; `minicpmv read`, `minicpmv video` and `minicpmv ask` use them.
"""
