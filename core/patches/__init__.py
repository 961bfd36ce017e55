"""Sets of image patches: storage, nearest neighbours, and their index."""
