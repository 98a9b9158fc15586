"""`minicpmv serve`: the server of transformers for this model. `request` tells what may be asked, `media` how images
and videos are fetched, `app` how it is answered."""
