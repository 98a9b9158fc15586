"""What people do with the model: read documents, find things in pictures, talk, tell what a clip shows.

`documents/` reads PDF files, scans and photographs, `grounding` finds things and draws their boxes, `assistant` keeps a
conversation with a personality and limits, `video` tells a clip with time stamps. All take any model and processor of
this architecture.
"""
