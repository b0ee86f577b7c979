"""Read and write adapter file formats, each in a file or folder of its own."""
