"""Hold everything that OUT is made of: the folder, shards, side files, card and receipt."""
